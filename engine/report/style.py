"""Style sheet and the few lines of script of the page. Without the script everything is still there, unsorted."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfbf9; --ink: #23262b; --muted: #696d74; --hair: #e6e3dd; --wash: #f3f1ec;
  --c1: #2f6291; --c2: #3f8a70; --c3: #b07a24; --c4: #875a86; --wrong: #c2573a; --on-strong: #fff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181b; --ink: #e3e1dc; --muted: #989b9f; --hair: #2d3035; --wash: #1d2024;
    --c1: #7eb0dd; --c2: #72c2a4; --c3: #dcab5c; --c4: #c495c2; --wrong: #e5805f; --on-strong: #14161a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 3rem 1.5rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word;
}
h1 { margin: 0; font-size: 1.9rem; font-weight: 620; line-height: 1.2; letter-spacing: -0.012em; }
h2 { margin: 3.4rem 0 0.9rem; font-size: 1.12rem; font-weight: 620; }
h3 { margin: 0 0 0.35rem; font-size: 0.93rem; font-weight: 600; }
p { margin: 0 0 0.8rem; max-width: 46rem; }
.eyebrow { margin: 0 0 0.3rem; color: var(--muted); font-size: 0.86rem; }
.lead { margin: 0.7rem 0 0; font-size: 1.1rem; text-wrap: pretty; }
.note, figcaption { color: var(--muted); font-size: 0.86rem; }
.note { margin: 0.5rem 0 0; }
.warning { margin-top: 1rem; padding-left: 0.8rem; border-left: 3px solid var(--wrong); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1.1rem 1.6rem;
  margin: 2rem 0 0;
  padding: 1.1rem 0; border: solid var(--hair); border-width: 1px 0; }
.tiles div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.tiles dt { color: var(--muted); font-size: 0.86rem; line-height: 1.35; }
.tiles dd { margin: 0; font-size: 1.4rem; font-weight: 560; line-height: 1.3; white-space: nowrap; }
.stack, .two, .three { display: grid; gap: 2rem 2.5rem; }
.two { grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); }
.three { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); margin-top: 2rem; }
.two > *, .three > * { min-width: 0; }
figure { margin: 0; break-inside: avoid; }
figcaption { margin-top: 0.4rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0.1rem 1.1rem; margin: 0 0 0.35rem; color: var(--muted);
  font-size: 0.86rem; }
.legend span { display: inline-flex; align-items: center; gap: 0.4rem; }
.legend i { width: 0.95rem; border-top: 2.5px solid currentColor; border-radius: 2px; }
.legend i.ring { flex: none; width: 12px; height: 12px; border: 2px solid currentColor; border-radius: 50%; }
.legend i.box { width: 0.7rem; height: 0.7rem; border: 0; background: currentColor; }
i.c1 { color: var(--c1); } i.c2 { color: var(--c2); } i.c3 { color: var(--c3); } i.c4 { color: var(--c4); }
i.wrong { color: var(--wrong); } i.ink { color: var(--ink); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--muted); font-size: 11.5px; }
svg text.small { font-size: 10.5px; }
.grid { stroke: var(--hair); } .notch { stroke: var(--wrong); stroke-width: 2; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.line.c1 { stroke: var(--c1); } .line.c2 { stroke: var(--c2); } .line.c3 { stroke: var(--c3); }
.line.c4 { stroke: var(--c4); }
.dot.c1 { fill: var(--c1); } .dot.c2 { fill: var(--c2); } .dot.c3 { fill: var(--c3); } .dot.c4 { fill: var(--c4); }
.line.faint { stroke: var(--c1); stroke-width: 1; opacity: 0.28; } .dot.faint { fill: var(--c1); opacity: 0.4; }
.best { fill: none; stroke: var(--ink); stroke-width: 1.8; }
.best-line { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 2 4; opacity: 0.55; }
.hover { fill: var(--ink); fill-opacity: 0; } .hover:hover { fill-opacity: 0.06; }
.frame { fill: var(--wash); } .right, .bar, .cap { fill: var(--c1); } .wrong, .gap { fill: var(--wrong); }
.bar { fill: color-mix(in srgb, var(--c1) 42%, var(--paper)); }
.gap { fill: color-mix(in srgb, var(--wrong) 45%, var(--paper)); } .rows { fill: var(--muted); fill-opacity: 0.45; }
.ideal { stroke: var(--ink); stroke-dasharray: 3 4; opacity: 0.6; } .point { fill: var(--c1); fill-opacity: 0.45; }
svg text.on-strong { fill: var(--on-strong); } svg text.on-weak { fill: var(--ink); }
.scroll { overflow: auto; } .scroll.tall { max-height: 34rem; border-bottom: 1px solid var(--hair); }
table { width: 100%; border-collapse: collapse; font-size: 0.9rem; line-height: 1.4; }
th, td { padding: 0.36rem 0 0.36rem 1.1rem; border-bottom: 1px solid var(--hair); text-align: left;
  vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; }
th { position: sticky; top: 0; background: var(--paper); color: var(--muted); font-weight: 500;
  vertical-align: bottom; white-space: nowrap; }
th[aria-sort] { color: var(--ink); } th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--c1); }
tbody tr:last-child td { border-bottom: 0; }
td.n, th.n { text-align: right; white-space: nowrap; overflow-wrap: normal; } th.n { width: 6.4rem; }
th.n:first-child { width: 4rem; } .two th.n { width: 4.2rem; } td.name { min-width: 7rem; overflow-wrap: anywhere; }
td[data-label] { overflow-wrap: anywhere; }
.cards td:first-child { width: 8.5rem; } .cards td:nth-child(2) { width: 46%; } .cards th.n { width: 4.4rem; }
tr.kept td { font-weight: 620; } .where { color: var(--muted); overflow-wrap: anywhere; }
td:first-child .where { white-space: nowrap; }
code, pre, .where { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 0.82rem; }
.meter { display: inline-block; width: 4.2rem; height: 0.5rem; margin: 0 0.8rem; background: var(--wash);
  vertical-align: 0.06em; }
.meter i, .bars i { display: block; height: 100%; background: var(--c1); opacity: 0.75; }
.bars { columns: 24rem; column-gap: 2.5rem; margin: 0; padding: 0; list-style: none; font-size: 0.88rem; }
.bars li { display: grid; grid-template-columns: minmax(0, 11rem) minmax(3rem, 1fr) 3.6rem; gap: 0.7rem;
  align-items: center;
  padding: 0.12rem 0; break-inside: avoid; }
.bars span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bars b { font-weight: 400; text-align: right; }
.bars div { height: 0.55rem; }
.below { margin-top: 1.8rem; }
.pair { display: block; margin-top: 0.15rem; padding-left: 0.7rem; border-left: 2px solid var(--hair); }
details { margin-top: 0.6rem; } summary { cursor: pointer; color: var(--c1); }
pre { margin: 0.7rem 0 0; padding: 0.9rem 1.1rem; background: var(--wash); line-height: 1.5; overflow: auto;
  white-space: pre-wrap; }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.2rem 1.3rem; margin: 0;
  font-size: 0.9rem; }
.facts dt { color: var(--muted); } .facts dd { margin: 0; }
@media (max-width: 40rem) {
  body { padding: 1.8rem 1.05rem 3rem; } h1 { font-size: 1.55rem; } h2 { margin-top: 2.6rem; }
  .lead { font-size: 1.04rem; }
  .tiles { grid-template-columns: repeat(2, 1fr); gap: 0.9rem 1rem; } .tiles dd { font-size: 1.2rem; }
  svg text { font-size: 13.5px; } svg text.small { font-size: 12px; } svg.matrix text { font-size: 12px; }
  .three svg text { font-size: 11.5px; }
  .meter { display: none; } td.name { min-width: 5.5rem; } th, td { padding-left: 0.65rem; }
  table { font-size: 0.86rem; }
  table.cards, .cards tbody, .cards tr, .cards td { display: block; } .cards thead { display: none; }
  .cards tr { padding: 0.75rem 0; border-bottom: 1px solid var(--hair); } .cards tr:last-child { border-bottom: 0; }
  .cards td { padding: 0.06rem 0; border: 0; text-align: left; max-width: none; white-space: normal; }
  .cards td:nth-child(n) { width: auto; }
  .cards td[data-label]::before { content: attr(data-label) " "; color: var(--muted); }
}
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #1b1d20; --muted: #5b5f66; --hair: #d9d6d0; --wash: #f3f1ec;
    --c1: #2f6291; --c2: #3f8a70; --c3: #b07a24; --c4: #875a86; --wrong: #c2573a; --on-strong: #fff; }
  html { font-size: 12px; } thead { display: table-header-group; break-inside: avoid; }
  body { padding: 0; max-width: none; font-size: 9pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .tiles { grid-template-columns: repeat(6, auto); } section > p { break-after: avoid; }
  h2 { margin-top: 1.6rem; break-after: avoid; } tr, .tiles, .bars li { break-inside: avoid; }
  th { position: static; }
  .two { grid-template-columns: 1fr 1fr; } .three { grid-template-columns: 1fr 1fr 1fr; }
  .scroll, .scroll.tall { overflow: visible; max-height: none; border: 0; }
  details::details-content { content-visibility: visible; block-size: auto; }
  summary { list-style: none; color: var(--ink); }
}
"""

SCRIPT = """
for (const table of document.querySelectorAll('table.sortable')) {
  table.querySelectorAll('th').forEach((head, column) => {
    const button = document.createElement('button');
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener('click', () => {
      const down = head.getAttribute('aria-sort') === 'ascending';
      table.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => key(a).localeCompare(key(b), undefined, {numeric: true}));
      const numbers = [...body.rows].every(row => row.cells[column].dataset.value !== undefined);
      if (numbers) rows.sort((a, b) => key(a) - key(b));
      body.append(...(down ? rows.reverse() : rows));
    });
  });
}
addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(d => { d.open = true; }));
"""
