// A job's image in OpenSeadragon; two images one over the other, with a slider between them: those
// of a job, or, by ?with=, the first ones of two.

import { call } from "./api.js";
import { byId, setText } from "./dom.js";
import { ATTENTION, size } from "./format.js";

// Milliseconds after which the wheel is turned anew.
const STILL = 400;

const job = location.pathname.split("/").pop();
const beside = new URLSearchParams(location.search).get("with");

/** The images to show, each with its job, its tiles' side and its name. */
async function load() {
  const read = (id) => call("GET", `../images/${encodeURIComponent(id)}`);
  if (!beside) {
    const record = await read(job);
    return record.images.map((image) => ({ record, image, name: ATTENTION[image.attention] }));
  }
  const records = await Promise.all([job, beside].map(read));
  return records.map((record) => {
    const [image] = record.images;
    return { record, image, name: `${size(image)} · seed ${record.entry.seed} · ${ATTENTION[image.attention]}` };
  });
}

function makePane({ record, image }, index) {
  const pane = document.createElement("div");
  pane.className = index ? "pane over" : "pane";
  byId("panes").append(pane);
  return OpenSeadragon({
    element: pane,
    tileSources: {
      width: image.width, height: image.height, tileSize: record.tile,
      minLevel: 0, maxLevel: image.levels - 1,
      getTileUrl: (level, x, y) => `../images/${record.id}/${image.attention}/${level}/${x}_${y}.jpg`,
    },
    showNavigationControl: false, maxZoomPixelRatio: 8, minZoomImageRatio: 0.8, visibilityRatio: 0.6,
    animationTime: matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 0.5,
    crossOriginPolicy: false, smoothTileEdgesMinZoom: Infinity, imageSmoothingEnabled: true, drawer: "canvas",
    gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true }, tabIndex: index ? -1 : 0,
  });
}

/** Keeps the second pane where the first one is. */
function tie([first, second]) {
  const follow = () => {
    const item = first.world.getItemAt(0);
    if (!item) return;
    const zoom = item.viewportToImageZoom(first.viewport.getZoom(true)) * devicePixelRatio;
    setText(byId("zoom"), `${Math.round(100 * zoom)}%`);
    if (!second?.world.getItemCount()) return;
    second.viewport.zoomTo(first.viewport.getZoom(true), null, true);
    second.viewport.panTo(first.viewport.getCenter(true), true);
  };
  for (const event of ["open", "animation", "resize", "update-viewport"]) first.addHandler(event, follow);
  for (const event of ["open", "resize"]) second?.addHandler(event, follow);
}

/**
 * While the image is not zoomed in, one finger and the wheel scroll the page that the viewer is part
 * of, as far as it goes; and the image stays whole where the window changes.
 */
function keepWhole(viewer) {
  let zoomed = false;
  let resizing = false;
  const share = () => {
    if (resizing) return;
    zoomed = viewer.viewport.getZoom() > 1.01 * viewer.viewport.getHomeZoom();
    viewer.gestureSettingsTouch.dragToPan = zoomed;
    for (const part of [viewer.container, viewer.canvas]) part.style.touchAction = zoomed ? "none" : "pan-y";
  };
  for (const event of ["open", "zoom"]) viewer.addHandler(event, share);
  viewer.addHandler("resize", () => {
    resizing = true;
    queueMicrotask(() => { // when OpenSeadragon has set its own zoom, which cuts the image off
      resizing = false;
      if (!zoomed) viewer.viewport.goHome(true);
      share();
    });
  });
  let left = -Infinity; // when the page last had the wheel, which may turn on for a moment
  const leaveToPage = (event) => {
    const scrolls = event.deltaY > 0 || parent.scrollY > 0 || event.timeStamp - left < STILL;
    if (zoomed || event.ctrlKey || !scrolls) return;
    left = event.timeStamp;
    event.stopPropagation();
  };
  addEventListener("wheel", leaveToPage, { capture: true, passive: true });
}

function addTools(first) {
  const zoomBy = (factor) => first.viewport.zoomBy(factor).applyConstraints();
  byId("in").onclick = () => zoomBy(2);
  byId("out").onclick = () => zoomBy(0.5);
  byId("fit").onclick = () => first.viewport.goHome();
  byId("one").onclick = () => {
    const item = first.world.getItemAt(0);
    first.viewport.zoomTo(item.imageToViewportZoom(1 / devicePixelRatio)).applyConstraints();
  };
  byId("full").hidden = !document.fullscreenEnabled;
  byId("full").onclick = () =>
    document.fullscreenElement ? document.exitFullscreen() : document.documentElement.requestFullscreen();
  byId("tools").hidden = false;
}

function addSlider(second, names) {
  const slider = byId("slider");
  const line = byId("line");
  const half = 17; // of its thumb, in pixels
  const slide = () => {
    // The right image lies above; it is cut off left of the line.
    const x = half + ((innerWidth - 2 * half) * slider.value) / 100;
    second.element.style.clipPath = `inset(0 0 0 ${x}px)`;
    line.style.left = `${x}px`;
    // A name stands on its own image only.
    for (const [id, room] of [["left", x], ["right", innerWidth - x]]) {
      byId(id).style.visibility = byId(id).offsetWidth + 16 > room ? "hidden" : "visible";
    }
  };
  slider.oninput = slide;
  line.onpointerdown = (event) => line.setPointerCapture(event.pointerId);
  line.onpointermove = (event) => {
    if (!line.hasPointerCapture(event.pointerId)) return;
    slider.value = (100 * (event.clientX - half)) / (innerWidth - 2 * half);
    slide();
  };
  addEventListener("resize", slide);
  for (const id of ["slider", "line", "left", "right"]) byId(id).hidden = false;
  setText(byId("left"), names[0]);
  setText(byId("right"), names[1]);
  slide();
}

/**
 * OpenSeadragon adds a style element of its own where none has this mark, which the server's policy
 * forbids; what it says is in viewer.css.
 */
function markStyled() {
  const mark = document.createElementNS(null, "style");
  mark.setAttribute("data-openseadragon-mobile-css", "");
  document.head.append(mark);
}

try {
  markStyled();
  const shown = await load();
  const viewers = shown.map(makePane);
  window.viewers = viewers; // for who looks into it from outside
  tie(viewers);
  keepWhole(viewers[0]);
  addTools(viewers[0]);
  if (viewers.length > 1) addSlider(viewers[1], shown.map(({ name }) => name));
} catch (error) {
  setText(byId("problem"), error.status ? error.message : "The image could not be loaded; open it again.");
}
