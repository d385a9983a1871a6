// The mask explorer of docs/explorer.md. Its data come from tools/explorer_data.py.
"use strict";

(() => {
  const root = document.getElementById("explorer");
  const data = window.maskExplorerData;
  if (!data) {
    root.textContent = "The data of this page are missing. `make docs` writes them.";
    return;
  }

  // Sizes on the canvases, in their own pixels; the style sheet scales them to the page.
  const CELL = 12;
  const ZOOM = 4;
  const GUTTER = 16;
  const GAP = 10;
  const FRAMES_PER_ROW = 4;

  const side = data.size / data.patch; // patches in a row of a frame
  const blocksPerFrame = (side * side) / data.block;
  const bandHeight = data.size / blocksPerFrame; // a block is a band of whole rows of patches, in clip pixels
  const decode = (text) => Uint8Array.from(text, (digit) => data.digits.indexOf(digit));
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const stops = (ratios) => ratios.map((ratio) => `${Number((100 * ratio).toPrecision(3))} %`);
  const mega = (flops) => `${(flops / 1e6).toFixed(1)} MFLOP`;
  const frameOf = (block) => Math.floor(block / blocksPerFrame);
  const colourOf = Object.fromEntries(data.classes.map(([label, , colour]) => [label, colour]));
  const nameOf = Object.fromEntries(data.classes.map(([label, name]) => [label, name]));

  // --- the classes -------------------------------------------------------------------------------------------------

  /** How many blocks of a row are critical and negligible, as sla_ref.classify_blocks counts them. */
  function classCounts(blocks, criticalRatio, negligibleRatio) {
    const critical = Math.max(1, Math.trunc(criticalRatio * blocks));
    const negligible = Math.min(Math.trunc(negligibleRatio * blocks), blocks - critical);
    return { 1: critical, 0: blocks - critical - negligible, "-1": negligible };
  }

  /** The labels of a row whose key blocks are given in descending order of their scores. */
  function classifyRow(order, counts) {
    const labels = new Int8Array(order.length); // 0 is marginal
    order.subarray(0, counts[1]).forEach((block) => { labels[block] = 1; });
    order.subarray(order.length - counts[-1]).forEach((block) => { labels[block] = -1; });
    return labels;
  }

  // --- what is shown -----------------------------------------------------------------------------------------------

  const counted = (count) => Array.from({ length: count }, (_, index) => String(index + 1));
  const sliders = {
    critical: slider("Critical ratio", stops(data.critical_ratios), 1),
    negligible: slider("Negligible ratio", stops(data.negligible_ratios), 1),
    layer: slider("Layer", counted(data.layers.length), 2),
    head: slider("Head", counted(data.heads), 0),
    time: slider("Noise level t", data.times.map(String), 2),
    query: slider("Query block", counted(data.blocks), 25),
  };
  const at = (name) => Number(sliders[name].value);
  let keyBlock = 25; // chosen by a click or the arrow keys, like the query block
  let hovered = null; // [query block, key block] below the pointer, shown instead while it is there
  let orders = []; // of each query block: its key blocks in descending order of score
  let labels = []; // of each query block: the class of each key block

  const mapSize = data.blocks * CELL;
  const map = canvas(mapSize, mapSize, "Classes of all pairs of blocks. Arrow keys choose a pair.");
  const rowMark = element("div", "explorer-mark");
  const cellMark = element("div", "explorer-mark");
  const frameStep = data.size * ZOOM + GUTTER + GAP;
  const frameRowStep = data.size * ZOOM + GAP;
  const frames = canvas(
    FRAMES_PER_ROW * frameStep - GAP,
    Math.ceil(data.frames / FRAMES_PER_ROW) * frameRowStep - GAP,
    "Frames of the clip. Arrow keys choose the query block.",
  );
  const clip = new OffscreenCanvas(data.size, data.frames * data.size);
  const said = element("p", "");
  said.setAttribute("aria-live", "polite");
  const classTable = element("table", "");
  const costTable = element("table", "");

  build();
  classify();

  /** After a change of ratio, layer, head or noise level. */
  function classify() {
    const ratios = [data.critical_ratios[at("critical")], data.negligible_ratios[at("negligible")]];
    const counts = classCounts(data.blocks, ...ratios);
    const order = decode(data.layers[at("layer")].order[at("time")][at("head")]);
    orders = Array.from({ length: data.blocks }, (_, i) => order.subarray(i * data.blocks, (i + 1) * data.blocks));
    labels = orders.map((row) => classifyRow(row, counts));
    drawMap();
    drawClip();
    fillTables(counts);
    show();
  }

  /** After a change of the pair of blocks that is looked at. */
  function show() {
    const [i, j] = hovered ?? [at("query"), keyBlock];
    place(rowMark, 0, i, data.blocks, 1);
    place(cellMark, j, i, 1, 1);
    drawFrames(i, j);
    const critical = orders[i].filter((block) => labels[i][block] === 1);
    const rank = orders[i].indexOf(j) + 1;
    said.textContent =
      `Query block ${i + 1} (${describe(i)}). Its critical key blocks, best first: ` +
      `${[...critical].map((block) => `${block + 1} (frame ${frameOf(block) + 1})`).join(", ")}. ` +
      `Key block ${j + 1} (${describe(j)}) is ${nameOf[labels[i][j]]}, rank ${rank} of ${data.blocks}.`;
  }

  function describe(block) {
    const rows = bandHeight / data.patch;
    const first = (block % blocksPerFrame) * rows + 1;
    return `frame ${frameOf(block) + 1}, patch rows ${first} to ${first + rows - 1}`;
  }

  function fillTables(counts) {
    const layer = data.layers[at("layer")];
    const figure = (name, ratio) => layer[name][at(ratio)][at("time")][at("head")];
    const mass = { 1: figure("critical_mass", "critical"), "-1": figure("negligible_mass", "negligible") };
    mass[0] = 1 - mass[1] - mass[-1];
    const classes = data.classes.map(([label, name]) => [
      [swatch(label), ` ${name}`], `${counts[label]} of ${data.blocks}`, percent(mass[label]),
    ]);
    fill(classTable, ["Class", "Key blocks per query block", "Attention they hold"], classes);
    const [flops, full] = [data.sla_flops[at("critical")], data.full_flops];
    fill(costTable, ["Figure", "Value"], [
      ["Operations of SLA, one head", `${mega(flops)}, ${percent(flops / full)} of full attention's ${mega(full)}`],
      ["Error with the critical blocks alone", percent(figure("critical_error", "critical"))],
      ["Error without the negligible blocks", percent(figure("negligible_error", "negligible"))],
    ]);
  }

  // --- drawing -----------------------------------------------------------------------------------------------------

  /** A box in the colour of its class; critical has a dot and negligible a stroke, so that they show without colour. */
  function drawBox(pen, x, y, width, height, label) {
    pen.fillStyle = colourOf[label];
    pen.fillRect(x, y, width, height);
    pen.fillStyle = pen.strokeStyle = "#000000";
    pen.beginPath();
    if (label === 1) {
      pen.arc(x + width / 2, y + height / 2, Math.min(width, height) / 4, 0, 2 * Math.PI);
      pen.fill();
    } else if (label === -1) {
      pen.lineWidth = 1.5;
      pen.moveTo(x + 2, y + height - 2);
      pen.lineTo(x + width - 2, y + 2);
      pen.stroke();
    }
  }

  function drawMap() {
    const pen = map.getContext("2d");
    labels.forEach((row, i) => row.forEach((label, j) => drawBox(pen, j * CELL, i * CELL, CELL, CELL, label)));
    pen.fillStyle = "#00000059";
    for (let edge = blocksPerFrame; edge < data.blocks; edge += blocksPerFrame) { // between frames
      pen.fillRect(edge * CELL - 0.5, 0, 1, map.height);
      pen.fillRect(0, edge * CELL - 0.5, map.width, 1);
    }
  }

  /** The frames of the clip, one below the other, in their own pixels. */
  function drawClip() {
    const image = new ImageData(clip.width, clip.height);
    decode(data.clips[at("time")]).forEach((level, pixel) => {
      const grey = Math.round((level * 255) / 63);
      image.data.set([grey, grey, grey, 255], 4 * pixel);
    });
    clip.getContext("2d").putImageData(image, 0, 0);
  }

  /** Upper left corner of a frame's picture. */
  function cornerOf(frame) {
    return [(frame % FRAMES_PER_ROW) * frameStep + GUTTER, Math.floor(frame / FRAMES_PER_ROW) * frameRowStep];
  }

  function drawFrames(queryBlock, key) {
    const pen = frames.getContext("2d");
    pen.clearRect(0, 0, frames.width, frames.height);
    pen.imageSmoothingEnabled = false;
    for (let frame = 0; frame < data.frames; frame += 1) {
      const picture = [0, frame * data.size, data.size, data.size];
      pen.drawImage(clip, ...picture, ...cornerOf(frame), data.size * ZOOM, data.size * ZOOM);
    }
    const boxOf = (block) => {
      const [left, top] = cornerOf(frameOf(block));
      return [left, top + (block % blocksPerFrame) * bandHeight * ZOOM, data.size * ZOOM, bandHeight * ZOOM];
    };
    labels[queryBlock].forEach((label, block) => {
      const [left, top, width, height] = boxOf(block);
      drawBox(pen, left - GUTTER, top, GUTTER, height, label);
      if (label === 1) outline(pen, left, top, width, height, colourOf[1]);
    });
    outline(pen, ...boxOf(key), "#ffffff", [6, 6]);
    outline(pen, ...boxOf(queryBlock), "#ffffff");
  }

  /** A frame inside a box, on black so that it shows on any picture. */
  function outline(pen, left, top, width, height, colour, dashes = []) {
    for (const [lineWidth, style, pattern] of [[6, "#000000", []], [3, colour, dashes]]) {
      pen.lineWidth = lineWidth;
      pen.strokeStyle = style;
      pen.setLineDash(pattern);
      pen.strokeRect(left + 3, top + 3, width - 6, height - 6);
    }
    pen.setLineDash([]);
  }

  function place(mark, column, row, columns, rows) {
    const share = (count) => `${(100 * count) / data.blocks}%`;
    Object.assign(mark.style, { left: share(column), top: share(row), width: share(columns), height: share(rows) });
  }

  // --- the page's elements -----------------------------------------------------------------------------------------

  function element(tag, className, ...children) {
    const made = document.createElement(tag);
    if (className) made.className = className; // Material styles tables that have no class
    made.append(...children);
    return made;
  }

  function canvas(width, height, label) {
    const made = element("canvas", "explorer-canvas");
    Object.assign(made, { width, height, tabIndex: 0 });
    made.setAttribute("role", "application");
    made.setAttribute("aria-label", label);
    return made;
  }

  function view(caption, ...parts) {
    return element("figure", "", element("figcaption", "", caption), element("div", "explorer-stage", ...parts));
  }

  function swatch(label) {
    const made = element("canvas", "explorer-swatch");
    made.width = made.height = CELL;
    drawBox(made.getContext("2d"), 0, 0, CELL, CELL, label);
    return made;
  }

  function slider(caption, values, start) {
    const input = element("input", "");
    Object.assign(input, { type: "range", min: 0, max: values.length - 1, step: 1, value: start });
    const shown = element("output", "");
    const tell = () => {
      shown.textContent = values[input.value];
      input.setAttribute("aria-valuetext", values[input.value]);
    };
    input.addEventListener("input", tell);
    tell();
    input.caption = element("label", "explorer-slider", element("span", "", `${caption}: `, shown), input);
    return input;
  }

  function fill(table, head, rows) {
    const line = (tag, cells) => element("tr", "", ...cells.map((cell) => element(tag, "", ...[cell].flat())));
    table.replaceChildren(
      element("thead", "", line("th", head)),
      element("tbody", "", ...rows.map((row) => line("td", row))),
    );
  }

  function choose(i, j) {
    const inside = (block) => Math.min(Math.max(block, 0), data.blocks - 1);
    keyBlock = inside(j);
    sliders.query.value = inside(i);
    sliders.query.dispatchEvent(new Event("input"));
  }

  function build() {
    for (const [name, part] of Object.entries({ map, frames, said })) part.id = `explorer-${name}`;
    for (const [name, input] of Object.entries(sliders)) {
      input.id = `explorer-${name}`;
      input.addEventListener("input", name === "query" ? () => { hovered = null; show(); } : classify);
    }

    const pairBelow = (event) => {
      const box = map.getBoundingClientRect();
      const block = (offset, size) => Math.min(Math.max(Math.floor((offset / size) * data.blocks), 0), data.blocks - 1);
      return [block(event.clientY - box.top, box.height), block(event.clientX - box.left, box.width)];
    };
    map.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse") { hovered = pairBelow(event); show(); }
    });
    map.addEventListener("pointerleave", () => { hovered = null; show(); });
    map.addEventListener("click", (event) => choose(...pairBelow(event)));

    frames.addEventListener("click", (event) => {
      const box = frames.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * frames.width;
      const y = ((event.clientY - box.top) / box.height) * frames.height;
      const frame = Math.floor(y / frameRowStep) * FRAMES_PER_ROW + Math.floor(x / frameStep);
      const band = Math.floor((y % frameRowStep) / (bandHeight * ZOOM));
      if (band < blocksPerFrame) choose(frame * blocksPerFrame + band, keyBlock);
    });

    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    map.addEventListener("keydown", (event) => {
      if (!(event.key in steps)) return;
      event.preventDefault();
      const [down, right] = steps[event.key];
      choose(at("query") + down, keyBlock + right);
    });
    frames.addEventListener("keydown", (event) => {
      if (!(event.key in steps)) return;
      event.preventDefault();
      const [down, right] = steps[event.key]; // a band down, or a frame to the right
      choose(at("query") + down + right * blocksPerFrame, keyBlock);
    });

    root.replaceChildren(
      element("div", "explorer-sliders", ...Object.values(sliders).map((input) => input.caption)),
      element("div", "explorer-views",
        view("Key blocks from left to right, query blocks from top to bottom", map, rowMark, cellMark),
        view("Classes of the key blocks for the chosen query block, on the clip", frames)),
      said, element("div", "explorer-tables", classTable, costTable),
    );
  }
})();
