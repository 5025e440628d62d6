// Numbers as people say them, not more exact than they are.

export function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 90 * 60) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

export function bytes(count) {
  if (count >= 1e9) return `${(count / 1e9).toFixed(1)} GB`;
  if (count >= 1e7) return `${Math.round(count / 1e6)} MB`;
  return count >= 1e5 ? `${(count / 1e6).toFixed(1)} MB` : `${Math.max(1, Math.round(count / 1e3))} kB`;
}

export function flops(count) {
  for (const [unit, size] of [["PFLOP", 1e15], ["TFLOP", 1e12]]) {
    const value = count / size;
    if (value >= 0.1) return `${value < 10 ? value.toFixed(2) : Math.round(value).toLocaleString("en")} ${unit}`;
  }
  return `${Math.round(count / 1e9).toLocaleString("en")} GFLOP`;
}

export const stepsOf = (count) => `${count} ${String(count) === "1" ? "step" : "steps"}`;

export const size = ({ width, height }) => `${width} × ${height}`;

export const shorten = (text, most = 80) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

export const ATTENTION = { clear: "CLEAR", full: "Full attention", both: "CLEAR and full attention" };
