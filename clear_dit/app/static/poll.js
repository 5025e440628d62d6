// The visitor's jobs, asked for again and again: often while one is at work, never while the page
// is hidden, and more and more seldom while the server is away.

import { ask, Away } from "./api.js";

const AT_WORK = 500;
const AT_REST = 3000;
const LONGEST = 15000;

export const isActive = (job) => job.state === "waiting" || job.state === "running";

/**
 * @param onJobs called with the jobs whenever something is new.
 * @param onAway called with true when the server does not answer, with false when it does again.
 */
export function makePoll({ onJobs, onAway }) {
  let jobs = [];
  let tag = null;
  let failures = 0;
  let timer = 0;
  let question = null;

  async function look() {
    clearTimeout(timer);
    question?.abort();
    const mine = (question = new AbortController());
    try {
      const headers = tag === null ? {} : { "if-none-match": tag };
      const { response, told } = await ask("GET", "api/jobs", undefined, { headers, signal: mine.signal });
      if (mine !== question) return;
      if (told !== null) {
        tag = response.headers.get("etag");
        onJobs((jobs = told.jobs));
      }
      failures = 0;
      onAway(false);
    } catch (error) {
      if (mine !== question || error.name === "AbortError") return;
      failures += 1;
      if (failures > 1 || !navigator.onLine || error instanceof Away) onAway(true);
    }
    question = null;
    if (!document.hidden) timer = setTimeout(look, pause());
  }

  function pause() {
    if (failures) return Math.min(LONGEST, 1000 * 2 ** (failures - 1));
    return jobs.some(isActive) ? AT_WORK : AT_REST;
  }

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) clearTimeout(timer);
    else look();
  });
  addEventListener("online", look);
  addEventListener("offline", () => onAway(true));

  return {
    look,
    get jobs() {
      return jobs;
    },
    /** Shows jobs that the server has just told of, then asks for all; an older answer is dropped. */
    add(news) {
      const ids = new Set(news.map((job) => job.id));
      jobs = [...news, ...jobs.filter((job) => !ids.has(job.id))];
      tag = null;
      onJobs(jobs);
      look();
    },
  };
}
