"use strict";
// Behaviour of the page: pictures open large and can be moved and zoomed; the channels of one layer are drawn.

const data = JSON.parse(document.getElementById("profiles").textContent);

// --- pictures: wheel, pinch and drag -------------------------------------------------------------------------------
const overlay = document.getElementById("overlay");
const large = overlay.querySelector("img");
let view = { x: 0, y: 0, scale: 1 };
const fingers = new Map();

function show() {
  large.style.imageRendering = view.scale > 2 ? "pixelated" : "auto"; // single channels without blur
  large.style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
}

function zoom(factor, x, y) {
  const scale = Math.min(40, Math.max(0.2, view.scale * factor));
  const growth = scale / view.scale;
  view = { x: x - (x - view.x) * growth, y: y - (y - view.y) * growth, scale };
  show();
}

function open(image) {
  large.src = image.src;
  large.alt = image.alt;
  overlay.hidden = false;
  const fit = Math.min(innerWidth / image.naturalWidth, innerHeight / image.naturalHeight);
  view = { x: (innerWidth - image.naturalWidth * fit) / 2, y: (innerHeight - image.naturalHeight * fit) / 2, scale: fit };
  show();
}

for (const button of document.querySelectorAll("button.zoom")) {
  button.addEventListener("click", () => open(button.querySelector("img")));
}
function close() {
  overlay.hidden = true;
  fingers.clear();
}
overlay.querySelector("button").addEventListener("click", close);
addEventListener("keydown", (event) => { if (event.key === "Escape") close(); });
overlay.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(Math.exp(-event.deltaY / 400), event.clientX, event.clientY);
}, { passive: false });
large.addEventListener("pointerdown", (event) => {
  event.preventDefault();
  large.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, event);
});
large.addEventListener("pointermove", (event) => {
  const last = fingers.get(event.pointerId);
  if (!last) return;
  const second = [...fingers.values()].find((f) => f.pointerId !== event.pointerId);
  if (second) {
    const distance = (a) => Math.hypot(a.clientX - second.clientX, a.clientY - second.clientY);
    const [x, y] = [(event.clientX + second.clientX) / 2, (event.clientY + second.clientY) / 2];
    zoom(distance(event) / Math.max(1, distance(last)), x, y);
  } else {
    view.x += event.clientX - last.clientX;
    view.y += event.clientY - last.clientY;
    show();
  }
  fingers.set(event.pointerId, event);
});
for (const name of ["pointerup", "pointercancel"]) {
  large.addEventListener(name, (event) => fingers.delete(event.pointerId));
}

// --- one layer's channels ------------------------------------------------------------------------------------------
const select = document.getElementById("layer");
const readout = document.getElementById("readout");
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const value = (curve, level) => curve.low * Math.pow(curve.high / curve.low, level / 255);

function draw(canvas, curve, channels) {
  const ratio = devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight, left = 54, bottom = 20;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const style = getComputedStyle(document.body);
  context.fillStyle = style.color;
  context.font = "12px system-ui, sans-serif";
  const inner = height - bottom - 8;
  for (const share of [0, 0.5, 1]) {
    const y = 8 + inner * (1 - share);
    context.globalAlpha = 0.25;
    context.fillRect(left, y, width - left, 1);
    context.globalAlpha = 1;
    context.fillText(value(curve, share * 255).toPrecision(2), 2, y + 4);
  }
  context.fillText("0", left, height - 5);
  const last = String(channels - 1);
  context.fillText(last, width - context.measureText(last).width - 2, height - 5);
  const bars = [[bytes(curve.before), style.getPropertyValue("--before")], [bytes(curve.after), style.getPropertyValue("--after")]];
  for (const [levels, colour] of bars) {
    const step = (width - left) / levels.length;
    context.fillStyle = colour;
    context.globalAlpha = 0.75;
    levels.forEach((level, i) => {
      const tall = Math.max(1, (level / 255) * inner);
      context.fillRect(left + i * step, 8 + inner - tall, Math.max(step, 0.6), tall);
    });
  }
  canvas.onpointermove = (event) => {
    const count = bars[0][0].length;
    const i = Math.floor(((event.offsetX - left) / (width - left)) * count);
    if (i < 0 || i >= count) return;
    const each = Math.ceil(channels / count);
    const where = each > 1 ? `channels ${i * each} to ${Math.min(channels, (i + 1) * each) - 1}` : `channel ${i}`;
    const at = bars.map(([levels]) => value(curve, levels[i]).toPrecision(3));
    readout.textContent = `${where}: ${at[0]} before, ${at[1]} after`;
  };
}

function drawLayer() {
  const entry = data[Number(select.value)];
  for (const name of ["X", "W"]) draw(document.getElementById(`curve-${name}`), entry.curves[name], entry.channels);
}

if (select) {
  // The layer with the largest ratio of its largest activation to its median activation is shown first.
  const ratios = data.map(({ curves: { X } }) => {
    const levels = bytes(X.before).sort();
    return value(X, levels[levels.length - 1]) / value(X, levels[levels.length >> 1]);
  });
  select.value = String(ratios.indexOf(Math.max(...ratios)));
  select.addEventListener("change", drawLayer);
  addEventListener("resize", drawLayer);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawLayer);
  drawLayer();
}
