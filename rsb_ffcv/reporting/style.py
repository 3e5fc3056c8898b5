"""Style sheet and script of the report."""

# The palette is Okabe and Ito's, as in curves.py. On a dark background, its sky blue replaces its
# blue, which is too dark there.
STYLE = """
:root {
  --paper: #ffffff; --raised: #f6f7f9; --ink: #16191d; --soft: #5a626c; --rule: #dfe3e8;
  --blue: #0072b2; --vermilion: #d55e00; --green: #009e73; --grey: #888888;
  --bar: #0072b229; --link: #005c91; --mark: #a34700;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --raised: #1d2126; --ink: #e8eaed; --soft: #a3abb5; --rule: #333a42;
    --blue: #56b4e9; --vermilion: #e8752a; --green: #18b98a; --grey: #9a9a9a;
    --bar: #56b4e938; --link: #7cc4ef; --mark: #ef9a5e;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 1120px; padding: 0 20px 40px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
  "Liberation Sans", sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 32px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -.01em; }
h2 { font-size: 22px; line-height: 1.25; margin: 0 0 14px; }
h3 { font-size: 16px; margin: 26px 0 8px; }
p { margin: 0 0 12px; max-width: 75ch; }
a { color: var(--link); }
code { font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono",
  monospace; }
header { padding: 36px 0 8px; }
.kicker { margin: 0 0 4px; color: var(--soft); font-size: 13px; letter-spacing: .06em;
  text-transform: uppercase; }
.lead { color: var(--soft); font-size: 16px; }
.state { color: var(--ink); border: 1px solid var(--rule); border-radius: 4px; padding: 1px 8px;
  margin-right: 6px; font-size: 14px; white-space: nowrap; }
.state.done { border-color: var(--green); }
.state.open { border-color: var(--vermilion); }
.tiles { list-style: none; margin: 22px 0 0; padding: 0; display: grid; gap: 1px;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); background: var(--rule);
  border: 1px solid var(--rule); border-radius: 8px; overflow: hidden; }
.tiles li { background: var(--paper); padding: 12px 14px; }
.tiles span, .tiles small { display: block; color: var(--soft); font-size: 13px; }
.tiles strong { display: block; font-size: 22px; line-height: 1.35; font-weight: 600;
  font-variant-numeric: tabular-nums; }
nav { position: sticky; top: 0; z-index: 1; background: var(--paper);
  border-bottom: 1px solid var(--rule); margin: 20px -20px 0; padding: 0 20px; }
nav ul { list-style: none; margin: 0; padding: 0; display: flex; gap: 20px; overflow-x: auto;
  white-space: nowrap; font-size: 14px; }
nav a { display: block; padding: 11px 0; text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { padding: 34px 0 6px; scroll-margin-top: 36px; }
.note { color: var(--soft); border-left: 3px solid var(--rule); padding-left: 12px; }
.id { color: var(--soft); font-size: 13px; }
em { font-style: normal; color: var(--soft); }
.box { overflow-x: auto; margin: 0 0 16px; border: 1px solid var(--rule); border-radius: 8px; }
.box:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; overflow-wrap: normal; }
th, td { text-align: left; padding: 6px 12px; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
td { overflow-wrap: break-word; }
tbody tr:last-child td { border-bottom: 0; }
th { background: var(--raised); font-weight: 600; font-size: 13px; white-space: nowrap; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td code { overflow-wrap: anywhere; }
.box:has(.small) { width: fit-content; max-width: 100%; }
.bar { background: linear-gradient(90deg, var(--bar) var(--share), transparent var(--share));
  min-width: 120px; }
.sortable th { cursor: pointer; }
.sortable th button { all: unset; cursor: pointer; font: inherit; }
.sortable th button:focus-visible { outline: 2px solid var(--blue); }
.sortable th[aria-sort] button::after { content: " \\25B2"; font-size: 10px; }
.sortable th[aria-sort=descending] button::after { content: " \\25BC"; }
.sortable td:nth-child(2), .classes td:nth-child(2) { min-width: 150px; }
.confused td { vertical-align: middle; }
.confused td:nth-child(-n+2) { min-width: 130px; }
.messages td:first-child { white-space: nowrap; font-variant-numeric: tabular-nums; }
.messages td:last-child { overflow-wrap: anywhere; min-width: 220px; }
.blocks { display: grid; gap: 0 32px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.blocks h3 { margin: 12px 0 2px; font-size: 14px; color: var(--soft); }
.facts { margin: 0 0 12px; font-size: 14px; }
.facts div { display: flex; gap: 16px; justify-content: space-between; padding: 5px 0;
  border-bottom: 1px solid var(--rule); }
.facts dt { color: var(--soft); flex: 0 0 auto; max-width: 50%; }
.facts dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
#environment .facts div { justify-content: flex-start; }
#environment dt { flex: 0 0 240px; }
#environment dd { text-align: left; }
details { margin: 14px 0; }
summary { cursor: pointer; padding: 6px 0; color: var(--link); }
details[open] > summary { margin-bottom: 8px; }
details > .box { max-height: 70vh; overflow-y: auto; }
details > .box th { position: sticky; top: 0; }
.lineage { padding-left: 20px; }
.charts { display: grid; gap: 20px 32px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
figure { margin: 0; }
.chart { max-width: 560px; }
.chart figcaption { font-weight: 600; }
.chart figcaption span { color: var(--soft); font-weight: 400; }
.chart > svg { display: block; width: 100%; height: auto; }
.legend { list-style: none; margin: 2px 0 4px; padding: 0; display: flex; flex-wrap: wrap;
  gap: 2px 16px; font-size: 13px; color: var(--soft); }
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.legend svg { vertical-align: middle; margin-right: 6px; }
svg text { fill: var(--soft); font-size: 13px; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .axis { stroke: var(--soft); stroke-width: 1; fill: none; }
svg .line { stroke: var(--c); stroke-width: 2; fill: none; stroke-linejoin: round; }
svg .expected { stroke: var(--c); stroke-width: 5; fill: none; opacity: .4; }
svg circle { fill: var(--c); }
svg rect { fill: var(--blue); }
.thumb { width: 112px; height: 112px; object-fit: contain; background: var(--raised);
  border-radius: 4px; display: inline-block; vertical-align: top; }
.thumb.none { color: var(--soft); font-size: 13px; text-align: center; line-height: 112px; }
.pair { white-space: nowrap; }
.pair .thumb { width: 84px; height: 84px; margin-right: 6px; }
.pair .none { line-height: 84px; }
.cards { display: grid; gap: 22px 18px;
  grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.card .thumb { width: 100%; height: 150px; }
.card .none { line-height: 150px; }
.card figcaption span { display: block; }
.card figcaption { font-size: 13px; line-height: 1.4; margin-top: 6px; }
.card .id { font-size: 12px; }
.card figcaption span .id { display: inline; }
footer { margin-top: 36px; padding-top: 14px; border-top: 1px solid var(--rule);
  color: var(--soft); font-size: 13px; }
@media (max-width: 600px) {
  body { padding: 0 16px 32px; }
  nav { margin: 16px -16px 0; padding: 0 16px; }
  h1 { font-size: 26px; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .cards { grid-template-columns: 1fr 1fr; }
  #environment .facts div { display: block; }
  svg text { font-size: 15px; }
  th, td { padding: 6px 8px; }
  .bar { min-width: 80px; }
  .sortable td:nth-child(2), .classes td:nth-child(2) { min-width: 120px; }
}
@media print {
  nav { display: none; }
  .box, details > .box { overflow: visible; max-height: none; }
  figure, tr { break-inside: avoid; }
}
"""

# Sorts a table by the column whose title is clicked. Without it, the tables stay as they are.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].textContent.replaceAll(",", "");
      const rows = [...table.tBodies[0].rows].sort((a, b) =>
        key(a).localeCompare(key(b), "en", { numeric: true }));
      table.tBodies[0].append(...(up ? rows : rows.reverse()));
    });
  });
}
"""
