// Gives each drafter a colour, the same one as long as the page is open.

const COUNT = 10;
const names = [];

/** Return the CSS class of a drafter's colour; null is the model. */
export function colour(name) {
  if (name === null) return "own";
  if (!names.includes(name)) names.push(name);
  return `c${names.indexOf(name) % COUNT}`;
}
