"use strict";
// Draws the figures of the page from the JSON in it, in the page's colours, and filters by a budget.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const GLYPHS = {circle: "●", square: "■", diamond: "◆", cross: "✚", star: "★", "circle-open": "○", x: "✖"};
  const DASHES = {solid: "", dash: "6 3", dot: "2 2", dashdot: "6 2 2 2"};
  // The buttons are listed because plotly.js 4 by default has one that sends a figure to a server.
  const CONFIG = {
    responsive: true, displaylogo: false, displayModeBar: true, plotlyServerURL: "",
    modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]],
  };

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  }

  // Names are escaped for plotly's labels, which are read as HTML; elsewhere they are plain text.
  function plain(name) {
    return name.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
  }

  function dressed(layout, version) {
    const text = colour("text"), line = colour("line");
    const out = structuredClone(layout);
    Object.assign(out, {
      font: {color: text, size: 12, family: "system-ui, sans-serif"},
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: {bgcolor: colour("card"), bordercolor: colour("faint"), font: {color: text, size: 12}, align: "left"},
      modebar: {bgcolor: "rgba(0,0,0,0)", color: colour("faint"), activecolor: text},
      dragmode: touch ? false : "zoom",  // a finger that drags scrolls the page; the buttons zoom
      uirevision: version,
    });
    for (const key of Object.keys(out).filter((key) => /^[xy]axis\d*$/.test(key))) {
      Object.assign(out[key], {gridcolor: line, linecolor: line, zerolinecolor: colour("faint")});
    }
    return out;
  }

  // The best configuration within the budget is the last step of the Pareto front that costs no more.
  function bestWithin(stairs, budget) {
    let low = 0, high = stairs.costs.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (stairs.costs[middle] <= budget) low = middle + 1; else high = middle;
    }
    return low - 1;
  }

  class Figure {
    constructor(element) {
      this.element = element;
      this.plot = element.querySelector(".plot");
      this.chart = charts[element.dataset.chart];
      this.version = Object.keys(this.chart.versions)[0];
      this.budget = null;  // in the unit of the axis
      this.hidden = new Set();
      const choose = element.querySelector("[data-choose]");
      choose?.addEventListener("change", () => { this.version = choose.value; this.setBudget(null); this.draw(); });
      this.number = element.querySelector("[data-budget]");
      if (!this.number) return;
      this.slide = element.querySelector("[data-slide]");
      this.pointed = element.querySelector("[data-pointed]");
      this.slide.setAttribute("aria-valuetext", "no budget");
      this.number.addEventListener("input", () => this.setBudget(this.number.value === "" ? null : Number(this.number.value), this.number));
      this.slide.addEventListener("input", () => this.setBudget(this.slid(Number(this.slide.value)), this.slide));
      element.querySelector("[data-clear]").addEventListener("click", () => this.setBudget(null));
    }

    get stairs() { return this.chart.budgets[this.version]; }

    slid(position) {
      const {least, most} = this.stairs;
      const step = (most - least) / 1000, digits = Math.max(0, 1 - Math.floor(Math.log10(step || 1)));
      return position >= 1000 ? null : Math.max(least, Number((least + step * position).toFixed(Math.min(digits, 12))));
    }

    setBudget(budget, by) {
      this.budget = budget;
      if (this.number && by !== this.number) this.number.value = budget ?? "";
      if (this.slide && by !== this.slide) {
        const {least, most} = this.stairs;
        this.slide.value = budget === null ? 1000 : Math.round(1000 * (budget - least) / (most - least || 1));
      }
      this.slide?.setAttribute("aria-valuetext", budget === null ? "no budget" : `${budget} ${this.stairs.unit}`);
      if (this.drawn && this.number && !this.waiting) {
        this.waiting = requestAnimationFrame(() => { this.waiting = 0; Plotly.relayout(this.plot, {shapes: this.filtered()}); });
      }
    }

    // The index of the best configuration within the budget, and a sentence about it.
    best() {
      const stairs = this.stairs;
      const limit = this.budget === null ? Infinity : Number((this.budget * stairs.scale).toPrecision(12));
      const index = bestWithin(stairs, limit);
      const under = this.budget === null ? "Without a budget" : `Within ${this.budget} ${stairs.unit}`;
      if (index < 0) return {index, text: `${under}: nothing fits; the least is ${this.amount(stairs.costs[0])} at ${stairs.configurations[0]}.`};
      return {index, text: `${under} the best is ${stairs.configurations[index]}: ${this.score(stairs.scores[index])} in the supernet, ${this.amount(stairs.costs[index])}.`};
    }

    score(value) { return `${value.toFixed(this.stairs.digits)}${this.stairs.what}`; }

    amount(cost) { return `${Number((cost / this.stairs.scale).toPrecision(7))} ${this.stairs.unit}`; }

    draw() {
      const figure = this.chart.versions[this.version];
      const layout = dressed(figure.layout, this.version);
      const traces = figure.data.map((trace) => ({...trace, visible: !this.hidden.has(trace.legendgroup ?? trace.name)}));
      if (this.number) layout.shapes = this.filtered();
      if (figure.layout.height) this.plot.style.height = `${figure.layout.height}px`;
      if (this.listed !== this.version) this.legend(figure.data);
      const ready = Plotly.react(this.plot, traces, layout, CONFIG);
      if (!this.drawn && this.pointed) this.plot.on("plotly_hover", ({points}) => this.describe(points[0]));
      this.drawn = true;
      return ready;
    }

    // Shows a point's details beneath the figure: its label has no room for many layers.
    describe({customdata, y}) {
      const [, kind, costs, , name] = customdata;
      const sizes = name.split("-").map((size, index) => `${this.stairs.layers[index]}: ${size}`);
      this.pointed.textContent = `${name}${kind}: ${this.score(y)} in the supernet, ${costs.replaceAll("<br>", " ")}; ${sizes.join(", ")}.`;
    }

    // Shows the best configuration within the budget, and returns its marks as shapes, so that no point is redrawn.
    filtered() {
      const {index, text} = this.best(), stairs = this.stairs, shapes = [];
      this.element.querySelector("[data-unit]").textContent = stairs.unit;
      this.element.querySelector("[data-best]").textContent = plain(text);
      if (this.budget !== null) {
        const line = {type: "line", yref: "paper", y0: 0, y1: 1, x0: this.budget, x1: this.budget, line: {color: colour("text"), width: 1, dash: "dash"}};
        const end = Math.max(2 * stairs.most - stairs.least, this.budget);
        shapes.push({...line, type: "rect", x1: end, fillcolor: colour("veil"), line: {width: 0}}, line);
      }
      const ring = this.chart.versions[this.version].data.at(-1);
      if (index >= 0 && !this.hidden.has(ring.name)) {
        const [x, y] = [stairs.costs[index] / stairs.scale, stairs.scores[index]];
        shapes.push({
          type: "circle", xsizemode: "pixel", ysizemode: "pixel", xanchor: x, yanchor: y, x0: -9, x1: 9, y0: -9, y1: 9,
          line: {color: ring.marker.color, width: 3},
        });
      }
      return shapes;
    }

    legend(traces) {
      this.listed = this.version;
      const list = this.element.querySelector(".legend");
      list.replaceChildren(...traces.filter((trace) => trace.name && trace.showlegend !== false).map((trace) => {
        const key = trace.legendgroup ?? trace.name;
        const button = document.createElement("button"), label = document.createElement("span");
        button.type = "button";
        button.setAttribute("aria-pressed", String(!this.hidden.has(key)));
        label.textContent = plain(trace.name);
        button.append(swatch(trace), label);
        button.addEventListener("click", () => {
          if (!this.hidden.delete(key)) this.hidden.add(key);
          button.setAttribute("aria-pressed", String(!this.hidden.has(key)));
          this.draw();
        });
        const item = document.createElement("li");
        item.append(button);
        return item;
      }));
    }
  }

  function swatch(trace) {
    const space = "http://www.w3.org/2000/svg", svg = document.createElementNS(space, "svg");
    svg.setAttribute("width", "26");
    svg.setAttribute("height", "14");
    svg.setAttribute("aria-hidden", "true");
    const add = (name, attributes, text) => {
      const node = document.createElementNS(space, name);
      for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
      if (text) node.textContent = text;
      svg.append(node);
    };
    if (trace.mode.includes("lines")) {
      add("line", {x1: 0, x2: 26, y1: 7, y2: 7, stroke: trace.line.color, "stroke-width": 2, "stroke-dasharray": DASHES[trace.line.dash ?? "solid"]});
    }
    if (trace.mode.includes("markers")) {
      add("text", {x: 13, y: 12, "text-anchor": "middle", "font-size": 14, fill: trace.marker.color}, GLYPHS[trace.marker.symbol ?? "circle"]);
    }
    return svg;
  }

  const figures = [...document.querySelectorAll("figure[data-chart]")].map((element) => new Figure(element));

  async function drawAll() {
    for (const figure of figures) {
      await figure.draw();
      await new Promise((done) => setTimeout(done));  // so that the page stays responsive between two figures
    }
    document.documentElement.dataset.drawn = String(figures.length);
  }

  dark.addEventListener("change", drawAll);
  drawAll();
})();
