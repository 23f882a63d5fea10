"""The page's only style sheet: light and dark, phone and desktop, screen and paper. No font or file is fetched."""

from __future__ import annotations

LIGHT = """
color-scheme:light;--paper:#ffffff;--box:#f5f7f9;--ink:#1d2229;--muted:#565f6b;--line:#d5dbe2;--grid:#e3e6ea;
--link:#0b5cad;--bad:#a8201a;--bad-box:#fdf1f0;--good:#1a6b34;--note:#7a5200;--teacher:#444444;
--student-1:#1f6fb4;--student-2:#c2571a;--student-3:#2e8b57;--student-4:#8a4fbf;--student-5:#b8860b;--student-6:#c2185b;
"""

DARK = """
color-scheme:dark;--paper:#14171c;--box:#1d2128;--ink:#e4e7eb;--muted:#a2abb7;--line:#363d47;--grid:#333942;
--link:#79b8f2;--bad:#ff9d94;--bad-box:#33191a;--good:#6fcf8e;--note:#e5b85c;--teacher:#b9bfc8;
--student-1:#5aa9e6;--student-2:#f0904f;--student-3:#58c48c;--student-4:#b78de3;--student-5:#dcae3e;--student-6:#f2719f;
"""

RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0 auto;padding:1rem 1rem 4rem;max-width:70rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0 .25rem}
h2{font-size:1.25rem;line-height:1.3;margin:2.75rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.5rem 0 .25rem}
p{margin:.4rem 0;max-width:46rem}
a{color:var(--link)}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.muted,.detail,figcaption,.under{color:var(--muted);font-size:.875rem}
nav ul{display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;list-style:none;margin:.75rem 0 0;padding:0}
nav a{display:inline-block;padding:.25rem 0}
#verdict h2{margin-top:1rem}
.headline{font-size:1.1rem;line-height:1.45}
.stats{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.6rem;margin:.9rem 0}
.stat{background:var(--box);border:1px solid var(--line);border-radius:.5rem;padding:.6rem .7rem;display:flex;
flex-direction:column}
.stat dt{color:var(--muted);font-size:.8125rem;line-height:1.3}
.stat dd{margin:0}
.stat .value{font-size:1.2rem;font-weight:650;line-height:1.3;font-variant-numeric:tabular-nums;padding:.1rem 0}
.stat .detail{font-size:.8125rem;line-height:1.35}
.findings{list-style:none;margin:.6rem 0;padding:0;max-width:52rem}
.findings li{padding:.15rem 0 .15rem .7rem;border-left:3px solid var(--line);margin:.4rem 0}
.findings .bad{border-color:var(--bad)}
.findings .good{border-color:var(--good)}
.findings .note{border-color:var(--note)}
.level{font-weight:650}
.bad .level{color:var(--bad)}
.good .level{color:var(--good)}
.note .level{color:var(--note)}
.faults{background:var(--bad-box);border:1px solid var(--bad);border-radius:.5rem;padding:.6rem .9rem;margin:1rem 0}
.faults h3{margin:0;color:var(--bad)}
.faults .findings{margin:.3rem 0 0}
.scroll{overflow-x:auto;max-width:100%;margin:1rem 0 .25rem;-webkit-overflow-scrolling:touch}
.scroll:focus-visible{outline:2px solid var(--link)}
table{border-collapse:collapse;width:max-content;font-size:.875rem;line-height:1.35;font-variant-numeric:tabular-nums;
overflow-wrap:normal}
caption{text-align:left;font-weight:650;padding-bottom:.35rem}
th,td{padding:.32rem .75rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{padding-left:0}
thead th{color:var(--muted);font-weight:600;vertical-align:bottom}
tbody th{font-weight:500}
td.number,th.number{text-align:right}
td.number{white-space:nowrap}
td.text,tbody th{max-width:20rem;overflow-wrap:break-word}
thead th{max-width:11rem}
td .detail{display:block;font-size:.8125rem}
.verdicts td,.verdicts thead th{width:10rem}
.verdicts tbody th{max-width:8rem}
details{margin:.5rem 0}
details .scroll{margin-top:.5rem}
details caption{position:absolute;clip-path:inset(50%);height:1px;overflow:hidden}
summary .detail{font-weight:400}
summary{cursor:pointer;font-weight:650;font-size:.875rem;padding:.25rem 0}
.plots{display:flex;flex-wrap:wrap;gap:.5rem 1.5rem;align-items:flex-start}
figure{margin:1rem 0;flex:0 1 auto;min-width:0;max-width:100%;width:var(--width)}
figure .scroll{margin:0}
figure svg{display:block;overflow:visible}
figure svg *{stroke-linejoin:round;stroke-linecap:butt}
figcaption{margin-top:.35rem}
.facts{display:grid;grid-template-columns:fit-content(35%) 1fr;gap:.25rem 1rem;
font-size:.875rem;margin:.75rem 0}
.facts dt{color:var(--muted)}
.facts dd{margin:0}
@media (max-width:600px){td.text,tbody th{max-width:13rem}tbody th{max-width:9rem}
.verdicts td,.verdicts thead th{width:7.25rem}.verdicts tbody th{max-width:5.5rem}th,td{padding:.32rem .5rem}}
@media print{details::details-content{content-visibility:visible;block-size:auto}
html{font-size:11px}body{max-width:none;padding:0;font-size:11px}table{width:auto}td.number{white-space:normal}
nav{display:none}h2,h3,caption{break-after:avoid}
figure,.stat,tr{break-inside:avoid}.scroll{overflow:visible}a{color:inherit;text-decoration:none}}
"""

STYLE_SHEET = f":root{{{LIGHT}}}@media screen and (prefers-color-scheme:dark){{:root{{{DARK}}}}}{RULES}".replace(
    "\n", ""
)
