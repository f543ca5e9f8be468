// Colours code by its parts: comments, strings, numbers, keywords. One rule for many languages.

const HASH = "python|py|bash|sh|shell|zsh|console|yaml|yml|toml|ruby|rb|r|perl|makefile|dockerfile|julia";
const DASHES = "sql|lua|haskell|hs|ada|elm";
const NONE = "json|text|txt|markdown|md|html|xml|css|diff|csv|";
const KEYWORDS = new Set(
  ("and as assert async await begin bool break case catch char class const continue def default del " +
    "do double elif else elseif end enum except export extends extern false False final finally float " +
    "fn for from func function global goto if impl implements import in include inline instanceof int " +
    "interface is lambda let local long loop match module mut namespace new nil None not null " +
    "nullptr or package pass private protected pub public raise require return self short signed " +
    "sizeof static string struct super switch template then this throw throws trait true True try " +
    "type typedef typeof union unless unsafe unsigned until use using val var virtual void when " +
    "where while with yield").split(" "),
);
const SQL = new Set(
  ("select insert update delete from where join inner outer left right on group order by having limit " +
    "offset values into set create table index view drop alter primary key foreign references not null " +
    "and or in is as case when then else end union all distinct with").split(" "),
);
const STRING = `"(?:[^"\\\\\\n]|\\\\.)*"|'(?:[^'\\\\\\n]|\\\\.)*'`;
const TRIPLE = `"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)`;
const REST = `(?<number>\\b\\d[\\w.]*)|(?<word>[A-Za-z_$][\\w$]*)`;
const patterns = new Map();

/** Return the parts of code in a language, in order: `{text, kind}`; null is plain text. */
export function codeParts(text, language) {
  const parts = [];
  let place = 0;
  const add = (end, kind) => {
    if (end > place) parts.push({ text: text.slice(place, end), kind });
    place = end;
  };
  for (const match of text.matchAll(pattern(language.toLowerCase()))) {
    const kind = kindOf(match.groups, language);
    if (!kind) continue;
    add(match.index, null);
    add(match.index + match[0].length, kind);
  }
  add(text.length, null);
  return parts;
}

function kindOf({ comment, string, number, word }, language) {
  if (comment) return "comment";
  if (string) return "string";
  if (number) return "number";
  const isKeyword = language.toLowerCase() === "sql" ? SQL.has(word.toLowerCase()) : KEYWORDS.has(word);
  return isKeyword ? "keyword" : null;
}

function pattern(language) {
  if (!patterns.has(language)) {
    const among = (names) => names.split("|").includes(language);
    const comment = among(HASH) ? "#.*" : among(DASHES) ? "--.*" : "\\/\\/.*|\\/\\*[^]*?(?:\\*\\/|$)";
    const first = among(NONE) ? "(?<comment>(?!))" : `(?<comment>${comment})`;
    const strings = among(HASH) ? `${TRIPLE}|${STRING}` : STRING;
    patterns.set(language, new RegExp(`${first}|(?<string>${strings})|${REST}`, "g"));
  }
  return patterns.get(language);
}
