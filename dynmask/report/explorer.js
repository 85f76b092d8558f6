// The explorer. A head is a number: layer's place * heads + head. Its figures come from the data
// block, its pictures are cut from the sheet of its layer.
document.addEventListener("DOMContentLoaded", () => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const { layers, heads, figures, plans } = data;
  const grid = document.querySelector(".grid");
  const [layerList, headList, figureList] = ["layer", "head", "figure"].map((n) => byId(`choose-${n}`));
  const count = layers.length * heads;
  let current = -1;

  const words = (index) => `Layer ${layers[Math.floor(index / heads)]}, head ${index % heads}`;
  const anchor = (index) => `#layer-${layers[Math.floor(index / heads)]}-head-${index % heads}`;

  function text(value, share, digits = 1) {
    return share ? (100 * value).toFixed(digits) : String(value).replace(/\B(?=(\d{3})+$)/g, "\u202f");
  }

  function signed(value, share, digits) {
    const size = text(Math.abs(value), share, digits);
    return (Number(size) === 0 ? "" : value < 0 ? "−" : "+") + size;
  }

  // In the script's hands the grid's links become buttons, one of which is a tab stop.
  const cells = [...grid.querySelectorAll(".cell")].map((link, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = link.className;
    button.tabIndex = -1;
    button.addEventListener("click", () => pick(index));
    link.replaceWith(button);
    return button;
  });
  grid.setAttribute("role", "grid");

  function colour() {
    const [kind, which] = figureList.value.split(":");
    const change = kind === "change";
    const plan = plans[change ? 1 : kind];
    const old = plans[0];
    const values = plan.values[which].map((v, i) => (change ? v - old.values[which][i] : v));
    // A difference is coloured by its size, a figure between the ends of both plans.
    const all = change ? values.map(Math.abs).concat(0) : plans.flatMap((p) => p.values[which]);
    const [low, high] = [Math.min(...all), Math.max(...all)];
    const name = figureList.selectedOptions[0].textContent;
    cells.forEach((cell, index) => {
      const value = values[index];
      const gate = change ? [old, plan].map((p) => p.gated[index]) : [0, plan.gated[index]];
      const framed = gate[0] !== gate[1];
      const state = change ? (framed ? "gate differs" : "same gate") : framed ? "gated" : "static";
      cell.classList.toggle("gated", framed);
      cell.classList.toggle("less", value < 0);
      cell.style.setProperty("--share", `${(100 * (Math.abs(value) - low)) / (high - low || 1)}%`);
      cell.textContent = change ? signed(value, true) : text(value, true, 0);
      const exact = change ? `${signed(value, true)} points` : `${text(value, true)} %`;
      cell.setAttribute("aria-label", `${words(index)}: ${name} ${exact}, ${state}`);
    });
    byId("framed").textContent = change ? "gate differs" : "gated";
    byId("unframed").textContent = change ? "same gate" : "static";
    const ends = change ? [signed(-high, true), signed(high, true)] : [low, high].map((v) => text(v, true));
    byId("range").textContent = `${ends.join(" to ")} ${change ? "points" : "%"}`;
    document.querySelector(".ramp.coverage").classList.toggle("change", change);
  }

  function why(plan, index) {
    const kept = text(plan.values[0][index], true, 2);
    const target = text(plan.target, true, 2).replace(/\.?0+$/, "");
    return plan.gated[index]
      ? `Gated: its columns and offsets keep ${kept} % of the attention, less than the target of ` +
        `${target} %. In mode “auto” its masks come from the input.`
      : `Static: its columns and offsets keep ${kept} % of the attention, at least the target of ` +
        `${target} %.`;
  }

  // Cut the head's picture of each kind from the sheet, whose layout is that of pictures.py.
  async function draw(box, number, index) {
    const { side } = plans[number];
    const head = index % heads;
    const sheet = byId(`sheet-${number}-${layers[Math.floor(index / heads)]}`);
    await sheet.decode();
    if (index !== current) return; // another head was picked meanwhile
    for (const canvas of box.querySelectorAll("canvas")) {
      const kind = Number(canvas.dataset.kind);
      const x = (head % data.across) * (side + data.gap);
      const y = (Math.floor(head / data.across) * data.kinds + kind) * (side + data.gap);
      const context = canvas.getContext("2d");
      context.clearRect(0, 0, side, side);
      context.drawImage(sheet, x, y, side, side, 0, 0, side, side);
      const caption = canvas.nextElementSibling.firstChild.textContent;
      canvas.setAttribute("aria-label", `${caption}, ${words(index).toLowerCase()}`);
    }
    box.dataset.drawn = index;
  }

  function show(index) {
    if (current >= 0) {
      cells[current].tabIndex = -1;
      cells[current].parentNode.setAttribute("aria-selected", "false");
    }
    current = index;
    cells[index].tabIndex = 0;
    cells[index].parentNode.setAttribute("aria-selected", "true");
    byId("chosen").textContent = words(index);
    layerList.selectedIndex = Math.floor(index / heads);
    headList.selectedIndex = index % heads;
    document.querySelectorAll(".plan").forEach((box, number) => {
      box.querySelector(".why").textContent = why(plans[number], index);
      draw(box, number, index);
    });
    const rows = document.querySelector(".numbers").tBodies[0].rows;
    figures.forEach(({ share, byLength }, which) => {
      const values = plans.map((plan) => plan.values[which][index]);
      const texts = values.map((value) => text(value, share));
      if (plans.length > 1) {
        // Densities at two different lengths have no difference.
        const apart = byLength && plans[0].length !== plans[1].length;
        texts.push(apart ? "–" : signed(values[1] - values[0], share));
      }
      texts.forEach((value, column) => { rows[which].cells[column + 1].textContent = value; });
    });
  }

  function pick(index) {
    show(index);
    history.replaceState(null, "", anchor(index));
  }

  function fromAddress() {
    for (let index = 0; index < count; index++) if (anchor(index) === location.hash) return index;
    return -1;
  }

  grid.addEventListener("keydown", (event) => {
    if (event.altKey || event.metaKey || event.shiftKey) return;
    const [layer, head] = [Math.floor(current / heads), current % heads];
    const there = {
      ArrowLeft: [layer, head - 1],
      ArrowRight: [layer, head + 1],
      ArrowUp: [layer - 1, head],
      ArrowDown: [layer + 1, head],
      Home: [event.ctrlKey ? 0 : layer, 0],
      End: [event.ctrlKey ? layers.length - 1 : layer, heads - 1],
    }[event.key];
    if (!there) return;
    event.preventDefault();
    if (there[0] < 0 || there[0] >= layers.length || there[1] < 0 || there[1] >= heads) return;
    pick(there[0] * heads + there[1]);
    cells[current].focus();
  });

  const fromLists = () => pick(layerList.selectedIndex * heads + headList.selectedIndex);
  layerList.addEventListener("change", fromLists);
  headList.addEventListener("change", fromLists);
  figureList.addEventListener("change", colour);
  byId("previous").addEventListener("click", () => pick((current + count - 1) % count));
  byId("next").addEventListener("click", () => pick((current + 1) % count));
  for (const link of document.querySelectorAll("a[data-head]")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      pick(Number(link.dataset.head));
      byId("panel").scrollIntoView();
      byId("chosen").focus({ preventScroll: true });
    });
  }
  window.addEventListener("hashchange", () => {
    if (fromAddress() >= 0) show(fromAddress());
  });

  document.querySelector(".controls").hidden = false;
  byId("panel").hidden = false;
  byId("sheets").open = false;
  colour();
  show(Math.max(fromAddress(), 0));
  if (fromAddress() >= 0) byId("explorer").scrollIntoView();
});
