// Small helpers for SVG.

/** An SVG element, with attributes and what is in it; text stays text. */
export function mark(name, attributes = {}, ...inside) {
  const found = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  found.append(...inside);
  return found;
}

const pen = document.createElement("canvas").getContext("2d");

/** Width of a text in pixels. */
export function width(text, font) {
  pen.font = font;
  return pen.measureText(text).width;
}
