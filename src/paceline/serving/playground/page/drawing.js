// Small helpers for SVG.

/** Return an SVG element with attributes and children; text stays text. */
export function mark(name, attributes = {}, ...inside) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...inside);
  return element;
}

const pen = document.createElement("canvas").getContext("2d");

/** Return the width of a text in pixels. */
export function width(text, font) {
  pen.font = font;
  return pen.measureText(text).width;
}
