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
  const GAP = 10;
  const FRAMES_PER_ROW = 4;
  const TINT = 0.5; // opacity of a class's colour on the clip

  const side = data.size / data.patch; // patches in a row of a frame
  const blocksPerFrame = (side * side) / data.block;
  const bandHeight = data.size / blocksPerFrame; // a block is a band of whole rows of patches, in clip pixels
  const decode = (text) => Uint8Array.from(text, (digit) => data.digits.indexOf(digit));
  const counted = (count) => Array.from({ length: count }, (_, index) => String(index + 1));
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const ratio = (stop) => `${Number((100 * stop).toPrecision(3))} %`;
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

  // --- what is chosen ----------------------------------------------------------------------------------------------

  // The stops of each setting are its words in the address. `state` has the place of one stop for each.
  const settings = {
    layer: { caption: "Layer", stops: counted(data.layers.length), start: 2 },
    head: { caption: "Head", stops: counted(data.heads), start: 0 },
    t: { caption: "Noise level t", stops: data.times.map(String), start: 2 },
    critical: { caption: "Critical ratio", stops: data.critical_ratios.map(String), start: 1, shown: ratio },
    negligible: { caption: "Negligible ratio", stops: data.negligible_ratios.map(String), start: 1, shown: ratio },
    query: { caption: "Query block", stops: counted(data.blocks), start: 25 },
    key: { stops: counted(data.blocks), start: 25 },
    clip: { caption: "Show the clean clip", stops: ["noisy", "clean"], start: 0 },
  };
  let state = read(location.hash);
  let hovered = null; // [query block, key block] below the pointer, shown instead of the chosen ones while it is there
  let writing = 0; // the timer of the next change of the address

  /** The state that an address stands for. What it does not name is as at the start. */
  function read(hash) {
    const given = new URLSearchParams(hash.slice(1));
    return Object.fromEntries(Object.entries(settings).map(([name, { stops, start }]) => {
      const place = stops.indexOf(given.get(name));
      return [name, place < 0 ? start : place];
    }));
  }

  function change(changes) {
    Object.assign(state, changes);
    hovered = null;
    update();
    clearTimeout(writing); // browsers allow few changes of the address in a second
    writing = setTimeout(() => history.replaceState(null, "", address()), 300);
  }

  function address() {
    return `#${Object.entries(settings).map(([name, { stops }]) => `${name}=${stops[state[name]]}`).join("&")}`;
  }

  /** A link of the page, the back button or a typed address: what has no "=" is a heading of the page. */
  function followAddress() {
    clearTimeout(writing); // what was set before must not be written over the address that came since
    if (location.hash && !location.hash.includes("=")) return;
    state = read(location.hash);
    update();
  }

  // --- what is shown -----------------------------------------------------------------------------------------------

  let orders = []; // of each query block: its key blocks in descending order of score
  let labels = []; // of each query block: the class of each key block

  const controls = [
    ...["layer", "head", "t", "critical", "negligible"].map(buttons),
    slider("query"),
    checkbox("clip"),
  ];
  const mapSize = data.blocks * CELL;
  const map = canvas(mapSize, mapSize, "Classes of all pairs of blocks. Arrow keys choose a pair.");
  const rowMark = element("div", "explorer-mark");
  const cellMark = element("div", "explorer-mark");
  const frameStep = data.size * ZOOM + GAP;
  const frames = canvas(
    FRAMES_PER_ROW * frameStep - GAP,
    Math.ceil(data.frames / FRAMES_PER_ROW) * frameStep - GAP,
    "Frames of the clip. Arrow keys choose the query block.",
  );
  const picture = new OffscreenCanvas(data.size, data.frames * data.size); // the frames, one below the other
  const said = element("p", "");
  said.setAttribute("aria-live", "polite");
  const bars = { blocks: element("div", "explorer-bar"), attention: element("div", "explorer-bar") };
  const classTable = element("table", "");
  const costTable = element("table", "");

  build();
  update();

  /** After any change of the state. */
  function update() {
    const ratios = [data.critical_ratios[state.critical], data.negligible_ratios[state.negligible]];
    const counts = classCounts(data.blocks, ...ratios);
    const order = decode(data.layers[state.layer].order[state.t][state.head]);
    orders = Array.from({ length: data.blocks }, (_, i) => order.subarray(i * data.blocks, (i + 1) * data.blocks));
    labels = orders.map((row) => classifyRow(row, counts));
    controls.forEach((control) => control.show());
    document.querySelectorAll(".explorer-tries a").forEach((link) => {
      const whole = read(link.hash);
      link.ariaCurrent = Object.keys(whole).every((name) => whole[name] === state[name]);
    });
    drawMap();
    drawPicture();
    fillTables(counts);
    show();
  }

  /** The pair of blocks that is looked at. */
  function show() {
    const [i, j] = hovered ?? [state.query, state.key];
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
    const layer = data.layers[state.layer];
    const measured = (name, place) => layer[name][place][state.t][state.head];
    const mass = {
      1: measured("critical_mass", state.critical),
      "-1": measured("negligible_mass", state.negligible),
    };
    mass[0] = 1 - mass[1] - mass[-1];
    stack(bars.blocks, (label) => counts[label] / data.blocks);
    stack(bars.attention, (label) => mass[label]);
    fill(classTable, ["Class", "Key blocks per query block", "Attention they hold"], data.classes.map(([label]) => [
      named(label), `${counts[label]} of ${data.blocks}`, percent(mass[label]),
    ]));
    const [flops, full] = [data.sla_flops[state.critical], data.full_flops];
    fill(costTable, ["Quantity", "Value"], [
      ["Operations of SLA, one head", `${mega(flops)}, ${percent(flops / full)} of full attention's ${mega(full)}`],
      ["Error with only the critical blocks", percent(measured("critical_error", state.critical))],
      ["Error without the negligible blocks", percent(measured("negligible_error", state.negligible))],
    ]);
  }

  /** A bar of one part for each class; parts that are wide enough say how large they are. */
  function stack(bar, shareOf) {
    bar.replaceChildren(...data.classes.map(([label, name]) => {
      const share = shareOf(label);
      const part = element("span", `sla-part-${name}`, share > 0.08 ? percent(share) : "");
      part.style.width = `${100 * share}%`;
      return part;
    }));
  }

  // --- drawing -----------------------------------------------------------------------------------------------------

  /** The mark of a class, so that it shows without colour: critical has a dot, negligible a stroke. */
  function drawMark(pen, x, y, size, label) {
    pen.fillStyle = pen.strokeStyle = "#000000";
    pen.beginPath();
    if (label === 1) {
      pen.arc(x + size / 2, y + size / 2, size / 4, 0, 2 * Math.PI);
      pen.fill();
    } else if (label === -1) {
      pen.lineWidth = size / 8;
      pen.moveTo(x + size / 6, y + (5 * size) / 6);
      pen.lineTo(x + (5 * size) / 6, y + size / 6);
      pen.stroke();
    }
  }

  function drawCell(pen, x, y, size, label) {
    pen.fillStyle = colourOf[label];
    pen.fillRect(x, y, size, size);
    drawMark(pen, x, y, size, label);
  }

  function drawMap() {
    const pen = map.getContext("2d");
    labels.forEach((row, i) => row.forEach((label, j) => drawCell(pen, j * CELL, i * CELL, CELL, label)));
    pen.fillStyle = "#00000059";
    for (let edge = blocksPerFrame; edge < data.blocks; edge += blocksPerFrame) { // between frames
      pen.fillRect(edge * CELL - 0.5, 0, 1, map.height);
      pen.fillRect(0, edge * CELL - 0.5, map.width, 1);
    }
  }

  /** The frames in their own pixels: the first clip is the clean one, then there is one for each noise level. */
  function drawPicture() {
    const image = new ImageData(picture.width, picture.height);
    const clip = settings.clip.stops[state.clip] === "clean" ? 0 : 1 + state.t;
    decode(data.clips[clip]).forEach((level, pixel) => {
      const grey = Math.round((level * 255) / 63);
      image.data.set([grey, grey, grey, 255], 4 * pixel);
    });
    picture.getContext("2d").putImageData(image, 0, 0);
  }

  function drawFrames(queryBlock, keyBlock) {
    const pen = frames.getContext("2d");
    const width = data.size * ZOOM;
    const height = bandHeight * ZOOM;
    const cornerOf = (frame) => [(frame % FRAMES_PER_ROW) * frameStep, Math.floor(frame / FRAMES_PER_ROW) * frameStep];
    const boxOf = (block) => {
      const [left, top] = cornerOf(frameOf(block));
      return [left, top + (block % blocksPerFrame) * height, width, height];
    };
    pen.imageSmoothingEnabled = false;
    for (let frame = 0; frame < data.frames; frame += 1) {
      pen.drawImage(picture, 0, frame * data.size, data.size, data.size, ...cornerOf(frame), width, width);
    }
    labels[queryBlock].forEach((label, block) => {
      const [left, top] = boxOf(block);
      pen.globalAlpha = TINT;
      pen.fillStyle = colourOf[label];
      pen.fillRect(left, top, width, height);
      pen.globalAlpha = 1;
      if (label !== 0) drawCell(pen, left + 8, top + height / 2 - 8, 16, label);
    });
    outline(pen, ...boxOf(keyBlock), [6, 6]);
    outline(pen, ...boxOf(queryBlock), []);
  }

  /** A white frame inside a box, on black so that it shows on any picture. */
  function outline(pen, left, top, width, height, dashes) {
    for (const [lineWidth, style, pattern] of [[6, "#000000", []], [3, "#ffffff", dashes]]) {
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

  /** A class as it is drawn on the map, and its name. */
  function named(label) {
    const swatch = element("canvas", "explorer-swatch");
    swatch.width = swatch.height = 2 * CELL;
    drawCell(swatch.getContext("2d"), 0, 0, 2 * CELL, label);
    return element("span", "explorer-class", swatch, ` ${nameOf[label]}`);
  }

  function fill(table, head, rows) {
    const line = (tag, cells) => element("tr", "", ...cells.map((cell) => element(tag, "", cell)));
    table.replaceChildren(
      element("thead", "", line("th", head)),
      element("tbody", "", ...rows.map((row) => line("td", row))),
    );
  }

  // A control is an element with a function `show`, which makes it show the state.

  /** Radio buttons, which look like one row of buttons. */
  function buttons(name) {
    const { caption, stops, shown = String } = settings[name];
    const inputs = stops.map((_, at) => {
      const input = Object.assign(element("input", ""), { type: "radio", name: `explorer-${name}` });
      input.addEventListener("change", () => change({ [name]: at }));
      return input;
    });
    const row = inputs.map((input, at) => element("label", "", input, shown(stops[at])));
    const made = element("fieldset", "", element("legend", "", caption), element("div", "explorer-buttons", ...row));
    made.show = () => { inputs[state[name]].checked = true; };
    made.id = `explorer-${name}`;
    return made;
  }

  function slider(name) {
    const { caption, stops } = settings[name];
    const input = element("input", "");
    Object.assign(input, { type: "range", min: 0, max: stops.length - 1, id: `explorer-${name}` });
    input.addEventListener("input", () => change({ [name]: Number(input.value) }));
    const shown = element("output", "");
    const made = element("label", "explorer-slider", element("span", "", `${caption}: `, shown), input);
    made.show = () => {
      input.value = state[name];
      shown.textContent = stops[state[name]];
      input.setAttribute("aria-valuetext", stops[state[name]]);
    };
    return made;
  }

  function checkbox(name) {
    const input = Object.assign(element("input", ""), { type: "checkbox", id: `explorer-${name}` });
    input.addEventListener("change", () => change({ [name]: Number(input.checked) }));
    const made = element("label", "explorer-switch", input, ` ${settings[name].caption}`);
    made.show = () => { input.checked = Boolean(state[name]); };
    return made;
  }

  function choose(i, j) {
    const inside = (block) => Math.min(Math.max(block, 0), data.blocks - 1);
    change({ query: inside(i), key: inside(j) });
  }

  function build() {
    for (const [name, part] of Object.entries({ map, frames, said })) part.id = `explorer-${name}`;
    window.addEventListener("hashchange", followAddress);

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
      const frame = Math.floor(y / frameStep) * FRAMES_PER_ROW + Math.floor(x / frameStep);
      const band = Math.floor((y % frameStep) / (bandHeight * ZOOM));
      if (band < blocksPerFrame) choose(frame * blocksPerFrame + band, state.key);
    });

    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    map.addEventListener("keydown", (event) => {
      if (!(event.key in steps)) return;
      event.preventDefault();
      const [down, right] = steps[event.key];
      choose(state.query + down, state.key + right);
    });
    frames.addEventListener("keydown", (event) => {
      if (!(event.key in steps)) return;
      event.preventDefault();
      const [down, right] = steps[event.key]; // a band down, or a frame to the right
      choose(state.query + down + right * blocksPerFrame, state.key);
    });

    const legend = element("div", "explorer-legend", ...data.classes.map(([label]) => named(label)));
    root.replaceChildren(
      element("div", "explorer-controls", ...controls.slice(0, -1)),
      element("div", "explorer-views",
        view("Key blocks from left to right, query blocks from top to bottom", legend, map, rowMark, cellMark),
        view("The classes of the chosen query block, on the clip", controls.at(-1), frames)),
      said,
      element("div", "explorer-bars",
        element("span", "", "Share of the key blocks"), bars.blocks,
        element("span", "", "Share of the attention"), bars.attention),
      element("div", "explorer-tables", classTable, costTable),
    );
  }

  function view(caption, above, ...parts) {
    return element("figure", "",
      element("figcaption", "", element("span", "", caption), above), element("div", "explorer-stage", ...parts));
  }
})();
