// What the pages of the viewer and of the playground share: image, boxes, steps, and a card for each answer.
// The values drawn are made by egm_lib/viewer/page.py.
// Text from files only ever becomes a text node, so an expression or an answer cannot become markup.

const SVG = "http://www.w3.org/2000/svg";
let serial = 0;

function html(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const rectOf = ([x1, y1, x2, y2]) => ({ x: x1, y: y1, width: x2 - x1, height: y2 - y1 });

// A rectangle whose stroke lies outside it, so that it hides nothing: drawn twice as wide and clipped to the outside.
// Strokes keep their width in screen pixels whatever the image's size.
function outside(xyxy, attributes, width) {
  const id = `egm-outside-${serial++}`, far = 1e5, [x1, y1, x2, y2] = xyxy;
  const d = `M${-far} ${-far}H${far}V${far}H${-far}ZM${x1} ${y1}H${x2}V${y2}H${x1}Z`;
  return [svg("clipPath", { id }, svg("path", { d, "clip-rule": "evenodd" })),
    svg("rect", { ...rectOf(xyxy), fill: "none", "vector-effect": "non-scaling-stroke", "stroke-width": 2 * width, "clip-path": `url(#${id})`, ...attributes })];
}

function box(xyxy, { colour, dash = [], width, name, hit = false }) {
  const dashes = dash.map((length) => length * width).join(" ");
  const reach = { ...rectOf(xyxy), fill: "none", "vector-effect": "non-scaling-stroke", stroke: "transparent", "stroke-width": 14, "pointer-events": "stroke" };
  return svg("g", { class: "egm-box", "data-box": name },
    ...outside(xyxy, { stroke: colour, "stroke-dasharray": dashes }, width), ...(hit ? [svg("rect", reach)] : []));
}

// White beneath all boxes, so that they show on any image.
const halo = (xyxy, width) => outside(xyxy, { stroke: "white", "stroke-opacity": 0.85 }, width + 1.2);

function hidden(amodal, modal, id) {
  const ring = ([x1, y1, x2, y2]) => `M${x1} ${y1}H${x2}V${y2}H${x1}Z`;
  const size = Math.max(amodal[2] - amodal[0], amodal[3] - amodal[1]) / 14;
  return svg("g", { "data-box": "hidden" },
    svg("defs", {}, svg("pattern", { id, width: size, height: size, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
      svg("rect", { width: size / 4, height: size, fill: "white", "fill-opacity": 0.45 }),
      svg("rect", { width: size / 10, height: size, fill: "#111", "fill-opacity": 0.6 }))),
    svg("path", { d: ring(amodal) + ring(modal), fill: `url(#${id})`, "fill-rule": "evenodd" }),
    svg("g", { class: "egm-box", "data-box": "modal" },
      svg("rect", { ...rectOf(modal), fill: "none", stroke: "#111", "stroke-width": 1, "stroke-dasharray": "1.5 2.5", "vector-effect": "non-scaling-stroke" })));
}

const FAULT = "#C2185B";

// The places that a trace names (found by egm_lib/viewer/steps.py): numbered dots, joined in order by a thin line.
// Dots and numbers keep their size on the screen: `fitMarks` scales them. Numbers at one place stand side by side: 1,3.
function marks(m) {
  const layer = svg("g", { class: "egm-steps", "data-model": m.model }), here = {};
  m.steps.forEach((step, index) => {
    const number = index + 1, [x, y] = step.point, spot = step.point.map(Math.round).join();
    const before = here[spot] ?? "", label = `${before && ","}${number}${step.fault ? "!" : ""}`;
    here[spot] = before + label;
    const colour = step.fault ? FAULT : m.colour, parts = [];
    if (index > 0) {
      const [x0, y0] = m.steps[index - 1].point, line = { x1: x0, y1: y0, x2: x, y2: y, "vector-effect": "non-scaling-stroke" };
      parts.push(svg("line", { ...line, stroke: "white", "stroke-width": 3, "stroke-opacity": 0.8 }), svg("line", { ...line, stroke: m.colour, "stroke-width": 1.3 }));
    }
    if (step.kind === "box") parts.push(svg("rect", { ...rectOf(step.box), fill: "none", stroke: m.colour, "stroke-width": 1, "stroke-dasharray": "1.5 3", "vector-effect": "non-scaling-stroke" }));
    const text = svg("text", { x: 5 + 7 * before.length, y: -5, fill: colour }, label);
    parts.push(svg("g", { class: "egm-dot", transform: `translate(${x} ${y})`, "data-at": `${x} ${y}` },
      svg("circle", { r: 11, fill: "transparent" }),
      ...(step.fault ? [svg("circle", { r: 7, fill: "none", stroke: FAULT, "stroke-width": 1.8 })] : []),
      svg("circle", { r: 3.2, fill: colour, stroke: "white", "stroke-width": 1 }), text));
    layer.append(svg("g", { class: "egm-mark", "data-step": `${m.model}/${number}`, "data-number": number },
      svg("title", {}, `step ${number}${step.fault ? `: ${step.fault}` : ""}`), ...parts));
  });
  return layer;
}

function fitMarks(drawing) {
  const shown = drawing.getBoundingClientRect(), [, , width, height] = drawing.getAttribute("viewBox").split(" ").map(Number);
  if (!shown.width || !shown.height) return;
  const unit = Math.max(width / shown.width, height / shown.height); // of the image, for a pixel of the screen
  for (const dot of drawing.querySelectorAll(".egm-dot")) dot.setAttribute("transform", `translate(${dot.dataset.at}) scale(${unit})`);
}

// The part of the plane to show: the image, and boxes that leave it (amodal ones may).
function frame(view, boxes) {
  const known = boxes.filter(Boolean), { width: w, height: h } = view, clamp = (v, low, high) => Math.min(Math.max(v, low), high);
  const x1 = clamp(Math.min(0, ...known.map((b) => b[0] - 2)), -w, 0), y1 = clamp(Math.min(0, ...known.map((b) => b[1] - 2)), -h, 0);
  const x2 = clamp(Math.max(w, ...known.map((b) => b[2] + 2)), w, 2 * w), y2 = clamp(Math.max(h, ...known.map((b) => b[3] + 2)), h, 2 * h);
  return [x1, y1, x2 - x1, y2 - y1];
}

function image(view, models, { thin = false } = {}) {
  if (!view.width || !view.height) return html("div", { class: "egm-noimage" }, view.error || "no image");
  const at = frame(view, [view.gt_box, ...models.map((m) => m.box)]);
  const drawing = svg("svg", { viewBox: at.join(" "), class: "egm-image", role: "img", "data-width": view.width, "data-height": view.height });
  drawing.append(svg("title", {}, `${view.expression || "image"}: ground truth and predicted boxes`));
  drawing.append(svg("rect", { x: at[0], y: at[1], width: at[2], height: at[3], class: "egm-outside" }));
  if (view.image) {
    const crisp = Math.max(view.width, view.height) <= 256 ? "image-rendering: pixelated" : "";
    drawing.append(svg("image", { href: view.image, x: 0, y: 0, width: view.width, height: view.height, preserveAspectRatio: "none", style: crisp }));
  }
  if (view.gt_box && view.modal_box) drawing.append(hidden(view.gt_box, view.modal_box, `egm-hatch-${serial++}`));
  const boxed = models.filter((m) => m.box), [wide, slim] = thin ? [2, 1.1] : [3, 1.6];
  drawing.append(...boxed.flatMap((m) => halo(m.box, slim)), ...(view.gt_box ? halo(view.gt_box, wide) : []));
  if (view.gt_box) drawing.append(box(view.gt_box, { colour: "#111", width: wide, name: "ground truth" }));
  boxed.sort((a, b) => a.dash.length - b.dash.length); // dashes last: they show on a solid line in the same place
  for (const m of boxed) drawing.append(box(m.box, { colour: m.colour, dash: m.dash, width: slim, name: m.model, hit: !thin }));
  for (const m of models) if (m.steps) drawing.append(marks(m));
  return drawing;
}

const swatch = (colour, dash, width = 30) =>
  svg("svg", { width, height: 10, class: "egm-swatch", "aria-hidden": "true" },
    svg("line", { x1: 1, x2: width - 1, y1: 5, y2: 5, stroke: colour, "stroke-width": 3.2, "stroke-dasharray": dash.map((d) => d * 2.6).join(" ") }));

// Pieces of a trace as nodes; the words of a step can be pointed at and reached with the tab key.
function tinted(pieces, m = null) {
  return pieces.map(([text, kind]) => {
    if (!kind) return document.createTextNode(text);
    if (!kind.startsWith("step ")) return html("mark", { class: `egm-${kind}` }, text);
    const number = Number(kind.slice(5)), fault = m?.steps[number - 1]?.fault;
    return html("mark", { class: `egm-word${fault ? " egm-fault" : ""}`, tabindex: "0", "data-step": `${m?.model}/${number}`, "data-number": number,
      title: `step ${number}${fault ? `: ${fault}` : ""}` }, text, html("sup", {}, fault ? `${number}!` : `${number}`));
  });
}

function card(m, place, { off, toggle, light }) {
  const node = html("section", { class: `egm-card${off ? " egm-off" : ""}`, "data-model": m.model, style: `--egm-colour: ${m.colour}` });
  node.addEventListener("mouseenter", () => light(m.model));
  node.addEventListener("mouseleave", () => light(null));
  const verdict = !m.run ? html("span", { class: "egm-verdict" }, "not run")
    : m.success === null && !m.error ? html("span", { class: "egm-verdict" }, m.verdict) // the truth is not known
    : html("span", { class: `egm-verdict ${m.success ? "egm-hit" : "egm-miss"}` },
      m.error ? "✗ error" : `${m.success ? "✓" : "✗"} ${m.verdict}`);
  node.append(html("button", { class: "egm-name", type: "button", title: `show or hide the box (key ${place + 1})`, "aria-pressed": String(!off), onclick: () => toggle(m.model) },
    swatch(m.colour, m.dash), m.label), verdict);
  if (!m.run) return node;
  const facts = [m.reward === null ? null : `reward ${m.reward.toFixed(2)}`, m.tokens === null ? null : `${m.tokens} tokens`,
    typeof m.latency_ms === "number" ? `${Math.round(m.latency_ms)} ms` : null,
    typeof m.first_token_ms === "number" ? `first token after ${Math.round(m.first_token_ms)} ms` : null, m.note, m.truncated ? "cut at the token limit" : null,
    m.num_boxes > 1 ? `${m.num_boxes} boxes, the first counts` : null].filter(Boolean);
  node.append(html("div", { class: "egm-facts" }, facts.join(" · ")));
  if (m.error) node.append(html("p", { class: "egm-error" }, m.error));
  if (m.reasoning.length) node.append(html("p", { class: "egm-reasoning" }, ...tinted(m.reasoning, m)));
  else if (!m.error && m.answer) node.append(html("p", { class: "egm-reasoning egm-faint" }, "(answers without reasoning)"));
  if (m.answer) node.append(html("details", { class: "egm-answer" }, html("summary", {}, "answer"), html("pre", {}, m.answer)));
  return node;
}

const signed = (value) => `${value >= 0 ? "+" : "−"}${Math.abs(value).toFixed(2)}`;

function group(view, open) {
  const { completions, step } = view.group;
  const most = Math.max(1e-6, ...completions.map((c) => Math.abs(c.advantage)));
  const solved = completions.filter((c) => c.success).length;
  const text = html("div", { class: "egm-grouptext", "aria-live": "polite" }, "Point at a completion, or tap it, to read it.");
  const tell = (c, number) => text.replaceChildren(
    html("b", {}, `completion ${number + 1}: reward ${c.reward.toFixed(2)}, advantage ${signed(c.advantage)}. `),
    ...(c.reasoning.length ? tinted(c.reasoning) : [document.createTextNode(c.answer)]));
  const grid = html("div", { class: "egm-grid" }, ...completions.map((c, number) => {
    const colour = c.success ? "#0072B2" : "#D55E00", share = (Math.abs(c.advantage) / most) * 50;
    const tile = html("button", { type: "button", class: "egm-tile", onmouseenter: () => tell(c, number), onfocus: () => tell(c, number), onclick: () => tell(c, number) },
      image(view, [{ model: `completion ${number + 1}`, box: c.box, colour, dash: c.success ? [] : [4, 2] }], { thin: true }),
      html("span", { class: "egm-bar", role: "img", "aria-label": `advantage ${signed(c.advantage)}` },
        html("i", { style: `background: ${colour}; width: ${share}%; ${c.advantage >= 0 ? "left: 50%" : `right: 50%`}` })),
      html("span", { class: "egm-num" }, `r ${c.reward.toFixed(2)}`, html("span", {}, `A ${signed(c.advantage)}`)));
    return tile;
  }));
  const title = `GRPO group${step === null || step === undefined ? "" : ` at step ${step}`}: ${completions.length} completions, ${solved} hit`;
  return html("details", { class: "egm-group", ...(open ? { open: "" } : {}) }, html("summary", {}, title), grid, text);
}

function select(label, values, current, change) {
  const any = current === undefined;
  const node = html("select", { "aria-label": label, title: label, onchange: () => change(values[node.selectedIndex]) },
    ...values.map((value) => {
      const [key, text] = Array.isArray(value) ? value : [value, value];
      return html("option", { value: key, ...(key === current || (any && key === "any") ? { selected: "" } : {}) }, String(text));
    }));
  return node;
}

// Lights a model's box and card, or a step's mark and words, and reveals the traces step by step.
function pointing(main) {
  const light = (name) => {
    main.classList.toggle("egm-lit", name !== null);
    for (const node of main.querySelectorAll("[data-model], .egm-stage [data-box]")) {
      node.classList.toggle("egm-on", name !== null && (node.dataset.model === name || node.dataset.box === name));
    }
  };
  const point = (name) => {
    for (const node of main.querySelectorAll("[data-step]")) node.classList.toggle("egm-on", node.dataset.step === name);
  };
  // How many steps of each trace are shown; null: all. It is the page's own: the kernel need not know.
  let revealed = null;
  const mostSteps = () => Math.max(0, ...[...main.querySelectorAll(".egm-mark")].map((node) => Number(node.dataset.number)));
  function reveal(count) {
    const most = mostSteps();
    revealed = count === null || count >= most ? null : Math.max(0, count);
    for (const node of main.querySelectorAll(".egm-mark, .egm-word")) node.classList.toggle("egm-later", revealed !== null && Number(node.dataset.number) > revealed);
    const slider = main.querySelector(".egm-slider input");
    if (!slider) return;
    slider.value = revealed ?? most;
    slider.nextElementSibling.textContent = `${revealed ?? most} of ${most}`;
  }
  const revealBy = (by) => { const most = mostSteps(); if (most) reveal(Math.min(most, Math.max(0, (revealed ?? most) + by))); };
  const sizes = new ResizeObserver((entries) => entries.forEach((entry) => fitMarks(entry.target)));

  // Adds the slider, and makes what was just drawn answer to the mouse and the keyboard.
  function attach(stage) {
    const slider = html("input", { type: "range", min: 0, "aria-label": "steps shown", title: "steps of the reasoning shown (keys , and .)", oninput: () => reveal(Number(slider.value)) });
    if (stage.querySelector(".egm-mark")) stage.append(html("label", { class: "egm-slider" }, "steps ", slider, html("span", {})));
    for (const node of stage.querySelectorAll(".egm-box")) {
      node.addEventListener("mouseenter", () => light(node.dataset.box));
      node.addEventListener("mouseleave", () => light(null));
    }
    for (const node of main.querySelectorAll("[data-step]")) {
      for (const event of ["mouseenter", "focus", "click"]) node.addEventListener(event, () => point(node.dataset.step));
      for (const event of ["mouseleave", "blur"]) node.addEventListener(event, () => point(null));
    }
    slider.max = mostSteps();
    reveal(revealed);
    sizes.disconnect();
    const drawing = stage.querySelector(".egm-image");
    if (drawing) { fitMarks(drawing); sizes.observe(drawing); }
  }
  return { light, revealBy, attach, revealAll: () => { revealed = null; }, end: () => sizes.disconnect() };
}
