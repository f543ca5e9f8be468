// The same name, the same colour, as long as the page is open.

const COUNT = 10;
const names = [];

/** The CSS class of a drafter's name. */
export function colour(name) {
  if (name === null) return "own";
  if (!names.includes(name)) names.push(name);
  return `c${names.indexOf(name) % COUNT}`;
}
