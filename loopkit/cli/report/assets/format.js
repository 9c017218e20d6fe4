"use strict";
// Numbers and times as text, and elements. Text always goes in as text, never as HTML.

const DASH = "–";

function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

function fill(id, ...children) {
  const element = document.getElementById(id);
  element.replaceChildren(...children.flat().filter((child) => child != null));
  element.hidden = !element.childNodes.length;
  return element;
}

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

function whole(value) {
  return isNumber(value) ? Math.round(value).toLocaleString("en") : DASH;
}

function number(value) {
  if (!isNumber(value)) return value == null ? DASH : String(value);
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (Number.isInteger(value) && size < 1e9) return value.toLocaleString("en");
  if (size >= 1e9 || size < 1e-3) return value.toExponential(2);
  if (size >= 1e4) return Math.round(value).toLocaleString("en");
  return value.toFixed(4);
}

// With its unit, where the name of a value tells that.
function amount(name, value) {
  if (!isNumber(value)) return number(value);
  if (name.endsWith("runtime")) return value < 100 ? `${value.toFixed(2)} s` : duration(value);
  return name.endsWith("_per_second") ? whole(value) : number(value);
}

// Shorter: for the ticks of an axis.
function tick(value) {
  if (value == null) return "";
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-3)) return Number(value.toPrecision(3)).toExponential();
  return String(Number(value.toPrecision(4)));
}

// The ticks of one axis, all with an exponent if one has it.
function ticksText(values) {
  const texts = values.map(tick);
  if (!texts.some((text) => text.includes("e"))) return texts;
  return values.map((value) => (value ? Number(value.toPrecision(3)).toExponential() : tick(value)));
}

function duration(seconds) {
  if (!isNumber(seconds)) return DASH;
  const total = Math.max(0, Math.round(seconds));
  const two = (part) => String(part).padStart(2, "0");
  const days = Math.floor(total / 86400), hours = Math.floor(total / 3600) % 24;
  const minutes = Math.floor(total / 60) % 60, rest = total % 60;
  if (days) return `${days}d ${two(hours)}:${two(minutes)}:${two(rest)}`;
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

function bytes(size) {
  if (!isNumber(size)) return DASH;
  for (const [unit, scale] of [["kB", 1e3], ["MB", 1e6]])
    if (size < 1000 * scale) return `${(size / scale).toFixed(1)} ${unit}`;
  return `${(size / 1e9).toFixed(2)} GB`;
}

function micros(value) {
  if (!isNumber(value)) return DASH;
  return value < 1000 ? `${value.toFixed(0)} µs` : value < 1e6 ? `${(value / 1e3).toFixed(1)} ms` : `${(value / 1e6).toFixed(2)} s`;
}

function moment(text) {
  const date = new Date(text);
  return text && !Number.isNaN(date.valueOf())
    ? date.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" }) : DASH;
}

function percent(part) {
  return `${(100 * part).toFixed(part < 0.0995 ? 1 : 0)} %`;
}

function setting(value) {
  if (value === undefined) return DASH;
  if (value === null) return "none";
  if (typeof value === "string") return value === "" ? '""' : value;
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
