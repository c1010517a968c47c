"""The page's style sheet: light, dark, narrow and printed."""

LIGHT = """
--paper:#fcfcfb;--panel:#ffffff;--ink:#1a1a19;--soft:#5d5c58;--grid:#e6e5e0;--edge:#d6d5cf;
--c0:#2a78d6;--c1:#eb6834;--c2:#1baf7a;--c3:#4a3aa7;--c4:#c98500;--c5:#e87ba4;--c6:#008300;
--c7:#e34948;color-scheme:light;
"""

DARK = """
--paper:#161615;--panel:#1f1f1e;--ink:#f2f1ee;--soft:#b3b2ab;--grid:#34342f;--edge:#45443f;
--c0:#3987e5;--c1:#d95926;--c2:#199e70;--c3:#9085e9;--c4:#c98500;--c5:#d55181;--c6:#3fa33f;
--c7:#e66767;color-scheme:dark;
"""

COLORS = "".join(f".c{k}{{--c:var(--c{k})}}" for k in range(8))

CSS = f"""
:root{{{LIGHT}}}
@media screen and (prefers-color-scheme:dark){{:root{{{DARK}}}}}
{COLORS}
*{{box-sizing:border-box}}
body{{margin:0 auto;padding:24px 20px 60px;max-width:1240px;background:var(--paper);
color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}}
h1{{font-size:26px;line-height:1.2;margin:0 0 6px;overflow-wrap:anywhere}}
h2{{font-size:19px;margin:38px 0 8px;padding-top:10px;border-top:1px solid var(--edge)}}
h3{{font-size:15px;margin:20px 0 6px}}
p{{margin:4px 0 8px;max-width:85ch}}
.summary{{font-size:17px}}
.hint,.missing,figcaption,.notes{{color:var(--soft)}}
.missing{{font-style:italic}}
.large,.small,.cards{{display:grid;gap:14px}}
.large{{grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr))}}
.large figure{{max-width:760px}}
.small{{grid-template-columns:repeat(auto-fill,minmax(min(100%,240px),1fr))}}
.groups{{--cols:4;display:flex;flex-wrap:wrap;gap:0 14px}}
.group{{flex:0 0 calc(min(var(--n),var(--cols))*(100% + 14px)/var(--cols) - 14px);min-width:0;
display:flex;flex-direction:column}}
.group .small{{margin-top:auto}}
@media (max-width:1060px){{.groups{{--cols:3}}}}
@media (max-width:800px){{.groups{{--cols:2}}}}
@media (max-width:560px){{.groups{{--cols:1}}}}
.cards{{grid-template-columns:repeat(auto-fill,minmax(min(100%,360px),1fr))}}
figure,.card{{margin:0;padding:10px 12px;background:var(--panel);border:1px solid var(--edge);
border-radius:8px;min-width:0;break-inside:avoid}}
figure h4,.card h4{{font-size:14px;margin:0 0 4px;overflow-wrap:anywhere;font-weight:600}}
figcaption{{font-size:13px}}
svg{{display:block;width:100%;height:auto;font:12.5px system-ui,sans-serif}}
.small svg{{font-size:12px}}
.tick{{fill:var(--soft)}}.end{{text-anchor:end}}.mid{{text-anchor:middle}}
.grid,.axis{{fill:none;stroke:var(--grid);stroke-width:1}}.axis{{stroke:var(--soft)}}
.line{{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}}
.thin{{fill:none;stroke:var(--c);stroke-width:1.5}}
.band{{fill:var(--c);opacity:.2}}
.dot{{fill:var(--c);stroke:var(--panel);stroke-width:1}}
.bar{{fill:var(--c)}}
.hover path{{fill:none;stroke:var(--ink);opacity:0;pointer-events:stroke}}
.hover path:hover{{opacity:.14}}
.legend{{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:2px 0 4px;padding:0;
font-size:13px;color:var(--soft)}}
.swatch{{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;
background:var(--c);-webkit-print-color-adjust:exact;print-color-adjust:exact}}
.pair{{display:grid;grid-template-columns:1fr 1fr;gap:12px}}
.side{{min-width:0}}
.side img{{display:block;width:100%;max-width:260px;border-radius:4px;border:1px solid var(--edge)}}
.side img.pixels{{image-rendering:pixelated}}
.when{{font-size:13px;color:var(--soft)}}
.score{{font-size:13px;font-variant-numeric:tabular-nums}}
.thought{{font-size:13px;white-space:pre-wrap;overflow-wrap:anywhere;max-height:10.5em;
overflow-y:auto;margin:4px 0 0;color:var(--soft)}}
.scroll{{overflow-x:auto}}
table{{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}}
th,td{{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid var(--grid);
vertical-align:top}}
th{{font-weight:600}}
td.number,th.number{{text-align:right;white-space:nowrap}}
tr.all td{{font-weight:600}}
.ci{{color:var(--soft);font-weight:400}}
.config td{{overflow-wrap:anywhere}}
.config td:last-child{{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:13px}}
summary{{cursor:pointer;margin:6px 0}}
.notes{{margin:10px 0 0;padding-left:20px;font-size:14px}}
@media (max-width:560px){{body{{padding:14px 12px 40px}}h1{{font-size:22px}}
.summary{{font-size:16px}}svg{{font-size:16px}}.small svg{{font-size:12px}}
td,th{{padding-right:10px}}}}
@media print{{body{{padding:0;max-width:none;font-size:12px}}h2,h3{{break-after:avoid}}
.thought{{max-height:none;overflow:visible}}tr{{break-inside:avoid}}
.groups,.group{{display:block}}.small{{grid-template-columns:repeat(3,1fr)}}.hint{{break-after:avoid}}
.scroll{{overflow:visible}}details::details-content{{content-visibility:visible;height:auto}}
.bar,.band,.dot{{-webkit-print-color-adjust:exact;print-color-adjust:exact}}}}
"""
