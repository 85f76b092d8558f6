"use strict";
(() => {
  const root = document.documentElement;
  const heads = [...document.querySelectorAll(".head")];
  const cells = new Map([...document.querySelectorAll(".cell")].map((a) => [a.hash.slice(1), a]));
  const layerList = document.getElementById("choose-layer");
  const headList = document.getElementById("choose-head");
  let current = null;

  function show(head) {
    if (!head) return;
    if (current) {
      current.classList.remove("current");
      cells.get(current.id).removeAttribute("aria-current");
      cells.get(current.id).tabIndex = -1;
    }
    head.classList.add("current");
    cells.get(head.id).setAttribute("aria-current", "true");
    cells.get(head.id).tabIndex = 0;
    const others = heads.filter((h) => h.dataset.layer === head.dataset.layer);
    headList.replaceChildren(...others.map((h) => new Option(h.dataset.head, h.id)));
    layerList.value = head.dataset.layer;
    headList.value = head.id;
    current = head;
  }

  function select(head) {
    if (!head) return;
    show(head);
    history.replaceState(null, "", "#" + head.id);
  }

  function step(by) {
    select(heads[(heads.indexOf(current) + by + heads.length) % heads.length]);
  }

  function find(layer, head) {
    return document.getElementById(`layer-${layer}-head-${head}`);
  }

  // One cell is a tab stop; the arrow keys move between cells.
  function move(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const by = moves[event.key];
    const from = event.target.closest(".cell");
    if (!by || !from) return;
    event.preventDefault();
    const head = document.getElementById(from.hash.slice(1));
    const layers = [...layerList.options].map((o) => o.value);
    const layer = layers[layers.indexOf(head.dataset.layer) + by[0]];
    const target = layer !== undefined && find(layer, Number(head.dataset.head) + by[1]);
    if (!target) return;
    select(target);
    cells.get(target.id).focus();
  }

  if (heads.length) {
    root.classList.add("js");
    document.querySelector(".controls").hidden = false;
    cells.forEach((cell) => { cell.tabIndex = -1; });
    show(document.getElementById(location.hash.slice(1))?.closest(".head") ?? heads[0]);
    layerList.addEventListener("change", () =>
      select(find(layerList.value, current.dataset.head) ?? find(layerList.value, 0)));
    headList.addEventListener("change", () => select(document.getElementById(headList.value)));
    document.getElementById("previous").addEventListener("click", () => step(-1));
    document.getElementById("next").addEventListener("click", () => step(1));
    document.querySelector(".grid").addEventListener("keydown", move);
    window.addEventListener("hashchange", () =>
      show(document.getElementById(location.hash.slice(1))?.closest(".head")));
  }

  // For tests: whether every picture could be drawn.
  window.addEventListener("load", () => {
    const pictures = [...document.images];
    root.dataset.pictures = pictures.length;
    root.dataset.brokenPictures = pictures.filter((p) => !p.complete || !p.naturalWidth).length;
  });
})();
