"use strict";
// A job's image in OpenSeadragon; two images one over the other, with a slider between them.
(async () => {
  const byId = (id) => document.getElementById(id);
  const job = location.pathname.split("/").pop();
  const answer = await fetch(`../images/${job}`);
  if (!answer.ok) return;
  const record = await answer.json();
  const names = { clear: "CLEAR", full: "Full attention" };

  const viewers = record.images.map((image, index) => {
    const pane = document.createElement("div");
    pane.className = index ? "pane over" : "pane";
    byId("panes").append(pane);
    const source = {
      width: image.width, height: image.height, tileSize: record.tile,
      minLevel: 0, maxLevel: image.levels - 1,
      getTileUrl: (level, x, y) => `../images/${job}/${image.attention}/${level}/${x}_${y}.jpg`,
    };
    return OpenSeadragon({
      element: pane, tileSources: source, showNavigationControl: false, animationTime: 0.5,
      maxZoomPixelRatio: 8, minZoomImageRatio: 0.8, visibilityRatio: 0.6, crossOriginPolicy: false,
      smoothTileEdgesMinZoom: Infinity, imageSmoothingEnabled: true, drawer: "canvas",
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
    });
  });
  const [first, second] = viewers;
  window.viewers = viewers;

  const showZoom = () => {
    const item = first.world.getItemAt(0);
    if (!item) return;
    const zoom = item.viewportToImageZoom(first.viewport.getZoom(true)) * devicePixelRatio;
    byId("zoom").textContent = `${Math.round(100 * zoom)}%`;
  };
  const follow = () => {
    showZoom();
    if (!second || !second.world.getItemCount()) return;
    second.viewport.zoomTo(first.viewport.getZoom(true), null, true);
    second.viewport.panTo(first.viewport.getCenter(true), true);
  };
  for (const event of ["open", "animation", "resize", "update-viewport"]) first.addHandler(event, follow);
  if (second) second.addHandler("open", follow);

  byId("in").onclick = () => first.viewport.zoomBy(2).applyConstraints();
  byId("out").onclick = () => first.viewport.zoomBy(0.5).applyConstraints();
  byId("fit").onclick = () => first.viewport.goHome();
  byId("one").onclick = () => {
    const item = first.world.getItemAt(0);
    first.viewport.zoomTo(item.imageToViewportZoom(1 / devicePixelRatio)).applyConstraints();
  };
  byId("full").hidden = !document.fullscreenEnabled;
  byId("full").onclick = () =>
    document.fullscreenElement ? document.exitFullscreen() : document.documentElement.requestFullscreen();

  if (second) {
    const slider = byId("slider");
    const slide = () => {
      // The right image lies above; it is cut off left of the line.
      const half = 17, width = innerWidth - 2 * half;
      const x = half + (width * slider.value) / 100;
      second.element.style.clipPath = `inset(0 0 0 ${x}px)`;
      byId("line").style.left = `${x}px`;
    };
    slider.oninput = slide;
    addEventListener("resize", slide);
    for (const id of ["slider", "line", "left", "right"]) byId(id).hidden = false;
    byId("left").textContent = names[record.images[0].attention];
    byId("right").textContent = names[record.images[1].attention];
    slide();
  }
})();
