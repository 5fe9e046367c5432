// The page at / of a gateway: GET /status and GET /requests, every second, drawn. No library, no build step, and nothing
// from anywhere else. What came from a server or a client is only ever set as text. Drawing keeps the keyboard's place:
// whatever can have the focus has a data-key, and the focus returns to it after each redraw.
"use strict";

const PERIOD_MS = 1000;
const MAX_SAMPLES = 180;
const MAX_REQUESTS = 40;
const MAX_CHIPS = 12; // workers of one role that a cluster shows one by one
const DEGRADED = 0.6; // a path that is believed to carry less than this of its configured capacity
const MAX_WIRES = 64; // links between workers that a cluster shows one by one

const TTFT_PARTS = ["receive", "tokenize", "admission", "siblings", "route", "retries", "messages", "pull", "prefill_queue", "prefill"];
const TTST_PARTS = ["transfer_wait", "transfer", "decode_queue", "first_step", "retries", "messages"];
const PART_NAMES = {
  receive: "receive", tokenize: "tokenise", admission: "wait for a turn", siblings: "first sibling", route: "route",
  retries: "retries", messages: "messages", pull: "page pull", prefill_queue: "prefill queue", prefill: "prefill",
  transfer_wait: "wait for pages", transfer: "transfer", decode_queue: "decode queue", first_step: "second token",
  decode: "later tokens",
};

const samples = []; // what each poll saw of the whole, oldest first
let paused = false;
let timer = null;

// ---- small things ----

const $ = (id) => document.getElementById(id);

function make(space, tag, attributes, children) {
  const node = space ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "style") Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of [children].flat(Infinity)) if (child !== null && child !== undefined && child !== "") node.append(child);
  return node;
}
const h = (tag, attributes, ...children) => make(false, tag, attributes, children);
const s = (tag, attributes, ...children) => make(true, tag, attributes, children);

const sum = (items, of) => items.reduce((total, item) => total + (of(item) || 0), 0);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

function percentile(values, share) {
  if (!values.length) return null;
  const ordered = [...values].sort((a, b) => a - b);
  return ordered[Math.min(ordered.length - 1, Math.max(0, Math.ceil(share * ordered.length) - 1))];
}

function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 100) return `${value.toFixed(0)} s`;
  if (value >= 1) return `${value.toFixed(2)} s`;
  return value >= 0.01 ? `${(value * 1000).toFixed(0)} ms` : `${(value * 1000).toFixed(1)} ms`;
}
function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
  return `${value >= 100 || unit === 0 ? value.toFixed(0) : value.toFixed(1)} ${units[unit]}`;
}
const rate = (value) => (value === null || value === undefined ? "–" : `${bytes(value)}/s`);
const count = (value) => (value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en"));
const share = (value) => (value === null || Number.isNaN(value) ? "–" : `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`);
const ago = (age) => (age < 1 ? "now" : age < 90 ? `${age.toFixed(0)} s ago` : `${(age / 60).toFixed(0)} min ago`);

function replace(node, ...children) {
  const key = node.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  node.replaceChildren(...children);
  if (key) node.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
}

// ---- at a glance ----

function drawTiles(status, requests) {
  const now = samples[samples.length - 1];
  const before = samples[Math.max(0, samples.length - 11)];
  const span = (now.at - before.at) / 1000;
  const perSecond = span > 0 ? (now.requests - before.requests) / span : null;
  const done = requests.filter((r) => r.outcome === "ok");
  const ttft = done.map((r) => r.ttft_s).filter((v) => v !== undefined);
  const tpot = done.flatMap((r) => r.timings).map((t) => t.tpot_s).filter((v) => v !== undefined);
  const judged = requests.filter((r) => r.timings.some((t) => t.slo_ttft_met !== undefined || t.slo_tpot_met !== undefined) || r.outcome === "overloaded");
  const met = judged.filter((r) => r.outcome === "ok" && r.timings.every((t) => t.slo_ttft_met !== false && t.slo_tpot_met !== false));
  const routes = status.routes_by_place || {};
  const routed = sum(Object.values(routes), (v) => v);
  const refused = sum(Object.values(status.refusals || {}), (v) => v);
  const hits = now.prompt ? now.cached / now.prompt : null;
  const tiles = [
    ["Requests", perSecond === null ? "–" : `${perSecond.toFixed(1)}/s`, `${count(status.num_requests)} so far, ${count(refused)} refused`, samples.map((x, i) => (i ? x.requests - samples[i - 1].requests : 0))],
    ["In flight", count(status.num_inflight), `${count(status.num_queued)} wait for their turn`, samples.map((x) => x.inflight)],
    ["Time to first token", seconds(percentile(ttft, 0.5)), `p95 ${seconds(percentile(ttft, 0.95))}, last ${ttft.length}`, ttft.slice().reverse()],
    ["Time per output token", seconds(percentile(tpot, 0.5)), `p95 ${seconds(percentile(tpot, 0.95))}`, tpot.slice().reverse()],
    ["Goodput", judged.length ? share(met.length / judged.length) : "–", judged.length ? `of the last ${judged.length} with an objective` : "no request had an objective", []],
    ["Prefix cache hits", share(hits), `${count(now.cached)} of ${count(now.prompt)} prompt tokens`, samples.map((x) => (x.prompt ? x.cached / x.prompt : 0))],
    ["Offloaded", routed ? share((routes.offloaded || 0) / routed) : "–", `${count(routes.offloaded || 0)} of ${count(routed)} routes`, samples.map((x) => x.offloaded)],
    ["Threshold", threshold(status.offload), status.offload?.mode === "abundant" ? "bandwidth is abundant" : "bandwidth is scarce", samples.map((x) => x.threshold ?? 0)],
  ];
  replace($("tiles"), ...tiles.map(([name, big, small, line]) =>
    h("dl", { class: "tile", style: { margin: 0 } }, h("dt", {}, name), h("dd", { class: "big" }, big), h("dd", { class: "small" }, small), spark(line))));
}

function threshold(offload) {
  return offload && offload.threshold_tokens !== undefined ? `${count(offload.threshold_tokens)} tok` : "none goes";
}

function spark(values) {
  const shown = values.slice(-60);
  if (shown.length < 2) return null;
  const top = Math.max(...shown) || 1;
  const points = shown.map((v, i) => `${((100 * i) / (shown.length - 1)).toFixed(1)},${(24 - (21 * v) / top).toFixed(1)}`);
  return s("svg", { viewBox: "0 0 100 26", preserveAspectRatio: "none", "aria-hidden": "true" },
    s("polyline", { points: points.join(" "), fill: "none", stroke: "currentColor", "stroke-width": 1.3, "vector-effect": "non-scaling-stroke" }));
}

// ---- topology ----

const CHIP = { width: 124, height: 58, gap: 12 };

function drawTopology(status) {
  const workers = status.workers || [];
  if (!workers.length) {
    replace($("topology"), h("p", { class: "empty" }, "No worker has registered yet."));
    return;
  }
  const names = [...new Set(workers.map((w) => w.cluster_id))];
  const isHome = (name) => workers.some((w) => w.cluster_id === name && w.role === "decode");
  const home = names.filter(isHome), remote = names.filter((n) => !isHome(n));
  const width = 1200, boxes = new Map();
  const columns = remote.length ? [{ names: remote, x: 0, width: 400 }, { names: home, x: 640, width: 560 }] : [{ names: home, x: 0, width }];
  let height = 0;
  for (const column of columns) {
    let y = 4;
    for (const name of column.names) {
      const box = layCluster(name, workers.filter((w) => w.cluster_id === name), column.x + 2, y, column.width - 4);
      boxes.set(name, box);
      y += box.height + 22;
    }
    height = Math.max(height, y - 18);
  }
  for (const column of columns) { // what is lower stands in the middle of what is higher
    const used = sum(column.names, (n) => boxes.get(n).height + 22) - 18;
    for (const name of column.names) boxes.get(name).y += (height - used) / 2;
  }
  const paths = s("g", {}), labels = s("g", {}), groups = s("g", {});
  for (const box of boxes.values()) groups.append(drawCluster(box, status.links || []));
  (status.cluster_links || []).forEach((link) => drawPath(link, boxes, paths, labels));
  const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `${names.length} clusters, ${workers.length} workers` }, groups, paths, labels);
  replace($("topology"), svg);
}

function layCluster(name, workers, x, y, width) {
  const groups = [];
  let bottom = 34;
  for (const role of ["prefill", "decode"]) {
    const all = workers.filter((w) => w.role === role).sort((a, b) => a.worker_id.localeCompare(b.worker_id, "en", { numeric: true }));
    if (!all.length) continue;
    const shown = all.slice(0, MAX_CHIPS), perRow = Math.max(1, Math.floor((width - 20 + CHIP.gap) / (CHIP.width + CHIP.gap)));
    const rows = Math.ceil(shown.length / perRow);
    groups.push({ role, all, shown, perRow, y: bottom });
    bottom += 20 + rows * (CHIP.height + CHIP.gap) + 16;
  }
  return { name, workers, x, y, width, height: bottom - 8, groups };
}

function place(box, group, index) {
  const row = Math.floor(index / group.perRow), inRow = Math.min(group.perRow, group.shown.length - row * group.perRow);
  const used = inRow * (CHIP.width + CHIP.gap) - CHIP.gap;
  return { x: box.x + (box.width - used) / 2 + (index % group.perRow) * (CHIP.width + CHIP.gap), y: box.y + group.y + 18 + row * (CHIP.height + CHIP.gap) };
}

function drawCluster(box, links) {
  const where = new Map(), chips = [];
  for (const group of box.groups) {
    const more = group.all.length - group.shown.length;
    const running = sum(group.all, (w) => w.num_running), waiting = sum(group.all, (w) => w.num_waiting);
    chips.push(s("text", { class: "group-name", x: box.x + 14, y: box.y + group.y + 8 },
      `${group.all.length} ${group.role}: ${count(running)} running, ${count(waiting)} waiting${more ? `; ${more} more are not drawn` : ""}`));
    group.shown.forEach((worker, index) => {
      const at = place(box, group, index);
      where.set(worker.worker_id, at);
      chips.push(drawWorker(worker, at));
    });
  }
  const inside = links.filter((l) => where.has(l.from_worker) && where.has(l.to_worker) && l.from_worker !== l.to_worker);
  const wires = inside.length > MAX_WIRES ? [] : inside.map((link) => drawWire(link, where));
  return s("g", { "data-cluster": box.name },
    s("rect", { class: "cluster", x: box.x, y: box.y, width: box.width, height: box.height, rx: 14 }),
    s("text", { class: "cluster-name", x: box.x + 14, y: box.y + 22 }, box.name), wires, chips);
}

function drawWire(link, where) {
  const from = where.get(link.from_worker), to = where.get(link.to_worker);
  const down = to.y > from.y ? 1 : to.y < from.y ? -1 : 0;
  const x1 = from.x + CHIP.width / 2, x2 = to.x + CHIP.width / 2;
  const y1 = from.y + (down > 0 ? CHIP.height : down < 0 ? 0 : CHIP.height), y2 = to.y + (down > 0 ? 0 : down < 0 ? CHIP.height : CHIP.height);
  const bend = down ? (y2 - y1) / 2 : 26;
  const state = link.state === "failed" ? "failed" : link.throughput > 0 ? "busy" : "idle";
  const said = `${link.from_worker} to ${link.to_worker}: ${link.state}${link.reason ? `, ${link.reason}` : ""}, ${link.path || "no path yet"}, ${rate(link.throughput)} now, ${rate(link.rate)} expected`;
  return s("path", { class: `wire ${state}`, d: `M${x1} ${y1}C${x1} ${y1 + bend} ${x2} ${y2 - (down ? bend : -26)} ${x2} ${y2}`, "stroke-width": state === "idle" ? 1.2 : 2.2 }, s("title", {}, said));
}

function drawWorker(worker, at) {
  const used = worker.pages_total ? (worker.pages_total - worker.pages_free) / worker.pages_total : 0;
  const cached = worker.pages_total ? worker.pages_cached / worker.pages_total : 0;
  const inner = CHIP.width - 20;
  const name = worker.worker_id.length > 18 ? `…${worker.worker_id.slice(-17)}` : worker.worker_id;
  const hit = worker.prompt_tokens ? worker.cached_tokens / worker.prompt_tokens : null;
  const ranks = worker.tensor_parallel > 1 ? ` on ${worker.tensor_parallel} devices` : "";
  const said = `${worker.worker_id}, ${worker.role}${ranks}, ${worker.state}: ${worker.num_running} running, ${worker.num_waiting} waiting, ` +
    `${share(used)} of ${count(worker.pages_total)} pages in use, ${share(cached)} hold cached prefixes, ${share(hit)} of prompt tokens were cached, ` +
    `${worker.num_sessions} hand-overs under way, ${bytes(worker.bytes_sent)} sent, ${bytes(worker.bytes_received)} received`;
  return s("g", { class: `worker ${worker.role} ${worker.state}`, tabindex: 0, role: "img", "aria-label": said, "data-key": `worker:${worker.worker_id}` },
    s("title", {}, said),
    s("rect", { class: "body", x: at.x, y: at.y, width: CHIP.width, height: CHIP.height, rx: 9 }),
    s("rect", { class: "edge", x: at.x, y: at.y + 9, width: 4, height: CHIP.height - 18, rx: 2 }),
    s("text", { x: at.x + 11, y: at.y + 18 }, name),
    s("text", { class: "sub", x: at.x + 11, y: at.y + 33 }, worker.state === "ready" ? `${worker.num_running} run · ${worker.num_waiting} wait · ${worker.num_sessions} kv` : worker.state),
    s("rect", { class: "pages", x: at.x + 11, y: at.y + 41, width: inner, height: 8, rx: 3 }),
    s("rect", { class: "used", x: at.x + 11, y: at.y + 41, width: inner * clamp(used, 0, 1), height: 8, rx: 3 }),
    s("rect", { class: "cached", x: at.x + 11 + inner * clamp(used, 0, 1), y: at.y + 41, width: inner * clamp(cached, 0, 1 - clamp(used, 0, 1)), height: 8 }));
}

function drawPath(link, boxes, paths, labels) {
  const from = boxes.get(link.from_cluster), to = boxes.get(link.to_cluster);
  if (!from || !to || from === to) return; // what stays in a cluster is drawn there, and is in the table
  const right = to.x > from.x, sameColumn = to.x === from.x;
  const x1 = right || sameColumn ? from.x + from.width : from.x, x2 = right ? to.x : to.x + to.width;
  const y1 = from.y + from.height / 2 + (right ? -14 : 22), y2 = to.y + to.height / 2 + (right ? -14 : 22);
  const bend = sameColumn ? 60 : (x2 - x1) / 2;
  const d = `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - (sameColumn ? -60 : bend)} ${y2} ${x2} ${y2}`;
  const failed = link.num_usable === 0;
  const left = link.capacity && link.carries !== undefined ? link.carries / link.capacity : null; // of what it should carry
  const degraded = !failed && left !== null && left < DEGRADED;
  const load = degraded ? link.throughput / link.carries : link.utilisation;
  const state = failed ? "failed" : degraded ? "degraded" : load >= 0.9 ? "hot" : load >= 0.7 ? "warm" : "";
  const wide = 3 + 9 * clamp(load || 0, 0, 1);
  const said = failed ? "not used" : degraded ? `degraded to ${share(left)}` : load === undefined ? "capacity not known" : `${share(load)} used`;
  const more = failed ? `0 of ${link.num_links} pairs usable` : `${rate(link.throughput)} of ${rate(degraded ? link.carries : link.capacity ?? link.measured)}${link.rtt_s !== undefined ? ` · ${seconds(link.rtt_s)}` : ""}`;
  const title = `${link.from_cluster} to ${link.to_cluster}: ${said}, ${more}, believed ${rate(link.carries)}, ${link.num_usable} of ${link.num_links} pairs usable, ${bytes(link.bytes_queued)} queued`;
  const x = (x1 + x2) / 2, y = (y1 + y2) / 2;
  paths.append(s("path", { class: `path ${state}`, d, "stroke-width": wide }, s("title", {}, title)));
  if (link.throughput > 0) paths.append(s("path", { class: "path flow", d }));
  const width = Math.max(said.length, more.length) * 6.4 + 22;
  labels.append(s("g", { class: "path-label", tabindex: 0, role: "img", "aria-label": title, "data-key": `path:${link.from_cluster}:${link.to_cluster}`, "data-path": `${link.from_cluster}→${link.to_cluster}`, "data-state": state || "ok" },
    s("rect", { x: x - width / 2, y: y - 19, width, height: 38, rx: 8 }),
    s("text", { x, y: y - 3, "text-anchor": "middle" }, `${right ? "→ " : ""}${said}${right ? "" : " ←"}`),
    s("text", { class: "sub", x, y: y + 12, "text-anchor": "middle" }, more)));
}

// ---- the plan ----

function drawPlan(status) {
  const plan = status.plan || {}, history = plan.history || [];
  const roles = `${plan.num_prefill ?? 0} prefill, ${plan.num_decode ?? 0} decode`;
  const target = plan.target_prefill !== undefined && (plan.target_prefill !== plan.num_prefill || plan.target_decode !== plan.num_decode) ? ` → ${plan.target_prefill}, ${plan.target_decode}` : "";
  $("plan-now").textContent = `${plan.mode || "off"} · ${threshold(status.offload)} · ${roles}${target}`;
  $("plan-reason").textContent = status.offload?.reason || plan.reason || "";
  replace($("pools"), ...(plan.pools || []).map(drawPool));
  if (history.length < 2) {
    replace($("plan"), h("p", { class: "empty" }, plan.mode === "off" ? "The planner is off: no threshold, roles as configured." : "No history yet."));
    return;
  }
  const width = 600, top = 10, mid = 128, low = 190, left = 44;
  const oldest = Math.max(...history.map((x) => x.age_s), 1);
  const x = (age) => left + (width - left - 4) * (1 - age / oldest);
  const known = history.map((p) => p.threshold_tokens).filter((v) => v !== undefined);
  const most = Math.max(...known, 1) * 1.1;
  const y = (value) => (value === undefined ? top : mid - ((mid - top - 8) * value) / most);
  let line = "", previous = null;
  for (const point of history) {
    const px = x(point.age_s).toFixed(1), py = y(point.threshold_tokens).toFixed(1);
    line += previous === null ? `M${px} ${py}` : `H${px}V${py}`;
    previous = py;
  }
  line += `H${x(0).toFixed(1)}`;
  const people = Math.max(...history.map((p) => p.num_prefill + p.num_decode), 1);
  const bars = history.map((point, i) => {
    const from = x(point.age_s), to = i + 1 < history.length ? x(history[i + 1].age_s) : x(0), wide = Math.max(0.6, to - from);
    const unit = (low - mid - 14) / people;
    return [s("rect", { class: "role-decode", x: from, y: low - unit * point.num_decode, width: wide, height: unit * point.num_decode }),
      s("rect", { class: "role-prefill", x: from, y: low - unit * (point.num_decode + point.num_prefill), width: wide, height: unit * point.num_prefill })];
  });
  const changes = history.filter((p) => p.change).map((p) => s("line", { class: "change", x1: x(p.age_s), x2: x(p.age_s), y1: top, y2: low }, s("title", {}, `${ago(p.age_s)}: ${p.change}`)));
  const last = history[history.length - 1];
  const said = `Threshold over the last ${oldest.toFixed(0)} seconds, now ${threshold(status.offload)}; roles now ${last.num_prefill} prefill and ${last.num_decode} decode; ${changes.length} changes`;
  replace($("plan"), s("svg", { class: "chart", viewBox: `0 0 ${width} ${low + 18}`, role: "img", "aria-label": said },
    s("line", { class: "grid", x1: left, x2: width, y1: mid, y2: mid }), s("line", { class: "grid", x1: left, x2: width, y1: low, y2: low }),
    s("text", { x: left - 6, y: top + 9, "text-anchor": "end" }, known.length ? count(most / 1.1) : "∞"), s("text", { x: left - 6, y: mid, "text-anchor": "end" }, "0"),
    s("text", { x: left - 6, y: low - 4, "text-anchor": "end" }, "roles"),
    s("path", { class: "area", d: `${line}V${mid}H${left}Z` }), bars, changes, s("path", { class: "threshold", d: line }),
    s("text", { x: left, y: low + 14 }, `${oldest.toFixed(0)} s ago`), s("text", { x: width, y: low + 14, "text-anchor": "end" }, "now")));
}

// A pool whose size may change: "decode pool: 1 ready of 2 desired (1 to 3), 1 pending".
function drawPool(pool) {
  const ready = (pool.ready_prefill ?? 0) + (pool.ready_decode ?? 0), pending = pool.pending || [], draining = pool.draining || [];
  const under_way = [...pending, ...draining].map((x) => `${x.worker_id} ${x.state} since ${x.age_s.toFixed(0)} s`).join("; ");
  const again = pool.retry_in_s === undefined ? "" : `, again in ${pool.retry_in_s.toFixed(0)} s`;
  return h("p", { class: pool.problem ? "reason pool problem" : "reason pool", "data-pool": pool.pool, title: under_way },
    `${pool.pool} pool: ${ready} ready of ${pool.desired ?? 0} desired (${pool.min_replicas ?? 0} to ${pool.max_replicas}${pool.held ? ", held" : ""})` +
    (pending.length ? `, ${pending.length} pending` : "") + (draining.length ? `, ${draining.length} draining` : "") + (pool.problem ? `; ${pool.problem}${again}` : ""));
}

// ---- routes and caches ----

function drawRouting(status) {
  const routes = Object.entries(status.routes_by_place || {}), all = sum(routes, ([, n]) => n) || 1;
  const colours = { local: "var(--prefill)", offloaded: "var(--p-transfer)", colocated: "var(--decode)" };
  const rows = [h("h3", {}, "Where prompts were prefilled")];
  for (const [place, n] of routes) rows.push(...bar(place, n / all, colours[place] || "var(--soft)", `${count(n)} · ${share(n / all)}`));
  if (!routes.length) rows.push(h("span", { class: "value" }, "no route yet"), h("span", {}), h("span", {}));
  rows.push(h("h3", {}, "Prompt tokens that a pool had cached"));
  for (const role of ["prefill", "decode"]) {
    const pool = (status.workers || []).filter((w) => w.role === role), prompt = sum(pool, (w) => w.prompt_tokens), cached = sum(pool, (w) => w.cached_tokens);
    rows.push(...bar(role, prompt ? cached / prompt : 0, `var(--${role})`, `${share(prompt ? cached / prompt : null)} of ${count(prompt)}`));
  }
  for (const [title, counts] of [["Fallbacks, by reason", status.fallbacks_by_reason], ["Refused, by the bound", status.refusals]]) {
    const entries = Object.entries(counts || {});
    if (!entries.length) continue;
    const top = Math.max(...entries.map(([, n]) => n));
    rows.push(h("h3", {}, title));
    for (const [reason, n] of entries) rows.push(...bar(reason, n / top, "var(--bad)", count(n)));
  }
  replace($("routing"), h("div", { class: "bars" }, rows));
}

function bar(name, value, colour, said) {
  return [h("span", {}, name), h("span", { class: "track" }, h("i", { style: { width: `${100 * clamp(value, 0, 1)}%`, background: colour } })), h("span", { class: "value" }, said)];
}

// ---- requests ----

function segments(request) {
  const timing = request.timings[0];
  if (!timing || !timing.ttft_parts) return [];
  const found = TTFT_PARTS.map((part) => ({ part, seconds: timing.ttft_parts[`${part}_s`] || 0 }));
  const second = timing.ttst_parts;
  if (second) found.push(...TTST_PARTS.map((part) => ({ part, seconds: second[`${part}_s`] || 0, later: true })));
  const known = sum(found, (x) => x.seconds);
  if (request.total_s > known) found.push({ part: "decode", seconds: request.total_s - known, later: true });
  return found.filter((x) => x.seconds > 0);
}

function drawRequests(requests) {
  const shown = requests.slice(0, MAX_REQUESTS);
  $("requests-aside").textContent = shown.length ? `the latest ${shown.length}, newest first` : "";
  if (!shown.length) {
    replace($("timeline"), h("p", { class: "empty" }, "No request has ended yet."));
    return;
  }
  const longest = Math.max(...shown.map((r) => r.total_s)) || 1;
  const open = new Set([...$("timeline").querySelectorAll("details[open]")].map((d) => d.dataset.request));
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((x) => h("span", {}, seconds(x * longest)));
  const axis = h("div", { class: "axis", "aria-hidden": "true" }, h("span", {}, "ended"), h("span", {}, "request"), h("span", {}, "outcome"), h("span", { class: "ticks" }, ticks), h("span", { class: "num" }, "tokens in/out"), h("span", { class: "num" }, "first"), h("span", { class: "num" }, "all"));
  replace($("timeline"), axis, ...shown.map((r) => drawRequest(r, longest, open.has(r.request_id))));
}

function askForKey() {
  if ($("key")) return; // it may be half typed
  const input = h("input", { id: "key", type: "password", autocomplete: "off", "data-key": "key" });
  const enter = () => {
    try { sessionStorage.setItem("prfaas-key", input.value.trim()); } catch { return; }
    replace($("timeline"), h("p", { class: "empty" }, "Asking with this key."));
    poll();
  };
  const button = h("button", { type: "button" }, "Show requests");
  button.addEventListener("click", enter);
  input.addEventListener("keydown", (event) => { if (event.key === "Enter") enter(); });
  const said = stored("prfaas-key") ? "That key is not one of the service's." : "Requests are shown to who has one of the service's keys.";
  $("requests-aside").textContent = "";
  replace($("timeline"), h("p", { class: "key" }, h("label", { for: "key" }, `${said} Key: `), input, " ", button));
}

function drawRequest(request, longest, isOpen) {
  const parts = segments(request), ok = request.outcome === "ok";
  const told = parts.filter((x) => x.seconds >= 0.0005).map((x) => `${PART_NAMES[x.part]} ${seconds(x.seconds)}`).join(", ");
  const said = `${request.request_id}, ${request.outcome}, ${request.prompt_tokens} tokens in, ${request.completion_tokens} out, first token after ${seconds(request.ttft_s)}, ${seconds(request.total_s)} in all: ${told || "no timing"}`;
  const firstEnd = parts.filter((x) => !x.later).length;
  const bars = parts.map((x, i) => h("i", { class: i === firstEnd - 1 ? "first" : null, title: `${PART_NAMES[x.part]}: ${seconds(x.seconds)}`, "data-part": x.part, style: { width: `${(100 * x.seconds) / longest}%`, background: `var(--p-${x.part})` } }));
  const line = parts.length ? bars : [h("i", { class: "failed", style: { width: `${(100 * request.total_s) / longest}%` } })];
  return h("details", { class: "request", "data-request": request.request_id, open: isOpen },
    h("summary", { "aria-label": said, "data-key": `request:${request.request_id}` },
      h("span", { class: "ago" }, ago(request.age_s)), h("span", { class: "name", title: request.request_id }, request.request_id),
      h("span", { class: `outcome ${ok ? "ok" : "bad"}` }, request.outcome), h("span", { class: "bar" }, line),
      h("span", { class: "num tokens" }, `${count(request.prompt_tokens)} / ${count(request.completion_tokens)}`),
      h("span", { class: "num ttft" }, seconds(request.ttft_s)), h("span", { class: "num" }, seconds(request.total_s))),
    drawDetail(request));
}

function drawDetail(request) {
  const timing = request.timings[0];
  if (!timing) return h("div", { class: "detail" }, h("p", {}, `It ended as ${request.outcome}.`));
  const table = (caption, whole, parts, values) => h("table", {}, h("caption", {}, `${caption}: ${seconds(whole)}`),
    parts.filter((p) => values[`${p}_s`] > 0).map((p) => h("tr", {}, h("td", {}, h("i", { class: "swatch", style: { background: `var(--p-${p})`, display: "inline-block", width: "10px", height: "10px", marginRight: "6px", borderRadius: "2px" } }), PART_NAMES[p]), h("td", { class: "n" }, seconds(values[`${p}_s`])))));
  const facts = [
    ["prefilled by", timing.prefill_worker || timing.decode_worker], ["decoded by", timing.decode_worker || timing.prefill_worker],
    ["cached tokens", count(request.cached_tokens)], ["shipped", bytes(timing.bytes_shipped)], ["per token", seconds(timing.tpot_s)],
    ["attempts", timing.num_attempts], ["fallback", timing.fallback], ["tenant", request.tenant], ["trace", request.trace_id],
  ].filter(([, value]) => value !== "" && value !== undefined && value !== null);
  return h("div", { class: "detail" },
    timing.ttft_parts ? table("to the first token", timing.ttft_s, TTFT_PARTS, timing.ttft_parts) : null,
    timing.ttst_parts ? table("from there to the second", sum(TTST_PARTS, (p) => timing.ttst_parts[`${p}_s`]), TTST_PARTS, timing.ttst_parts) : null,
    h("table", {}, h("caption", {}, "what it was"), facts.map(([name, value]) => h("tr", {}, h("td", {}, name), h("td", {}, String(value))))),
    h("p", {}, timing.route_reason));
}

// ---- tables ----

function drawTables(status) {
  const workers = (status.workers || []).slice().sort((a, b) => a.cluster_id.localeCompare(b.cluster_id) || b.role.localeCompare(a.role) || a.worker_id.localeCompare(b.worker_id, "en", { numeric: true }));
  const grid = (caption, heads, rows) => h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption, "data-key": `table:${caption}` }, h("table", {}, h("caption", {}, caption),
    h("tr", {}, heads.map((head, i) => h("th", { scope: "col", class: i > 2 ? "n" : null }, head))), rows.map((row) => h("tr", {}, row.map((cell, i) => h("td", { class: i > 2 ? "n" : null }, cell))))));
  replace($("tables"),
    grid("Workers", ["cluster", "worker", "role", "state", "running", "waiting", "pages used", "cached", "hits", "sent", "received"],
      workers.map((w) => [w.cluster_id, w.worker_id, w.tensor_parallel > 1 ? `${w.role} x${w.tensor_parallel}` : w.role, w.state, count(w.num_running), count(w.num_waiting), `${count(w.pages_total - w.pages_free)} of ${count(w.pages_total)}`, count(w.pages_cached), share(w.prompt_tokens ? w.cached_tokens / w.prompt_tokens : null), bytes(w.bytes_sent), bytes(w.bytes_received)])),
    grid("Links between clusters", ["from", "to", "path", "usable", "now", "believed", "capacity", "utilisation", "round trip", "queued", "sent"],
      (status.cluster_links || []).map((l) => [l.from_cluster, l.to_cluster, (l.paths || []).join(", "), `${l.num_usable} of ${l.num_links}`, rate(l.throughput), rate(l.carries), rate(l.capacity), share(l.utilisation ?? null), seconds(l.rtt_s), bytes(l.bytes_queued), bytes(l.bytes_sent)])));
}

// ---- the loop ----

function note(status) {
  const prefill = (status.workers || []).filter((w) => w.role === "prefill");
  const pool = prefill.length ? prefill : status.workers || [];
  samples.push({
    at: performance.now(), requests: status.num_requests, inflight: status.num_inflight, threshold: status.offload?.threshold_tokens,
    prompt: sum(pool, (w) => w.prompt_tokens), cached: sum(pool, (w) => w.cached_tokens), offloaded: status.routes_by_place?.offloaded || 0,
  });
  if (samples.length > MAX_SAMPLES) samples.shift();
}

function say(state, words) {
  const node = $("state");
  if (node.textContent !== words) node.textContent = words;
  node.dataset.state = state;
}

function drawHead(status) {
  $("model").textContent = status.model;
  document.title = `prfaas · ${status.model}`;
  const ready = (role) => (status.workers || []).filter((w) => w.role === role && w.state === "ready").length;
  const failed = (status.links || []).filter((l) => l.state === "failed").length;
  if (!ready("decode")) say("bad", "no decode worker is ready");
  else if (failed) say("warn", `serving, ${failed} of ${status.links.length} links not used`);
  else say("ok", "serving");
  const hours = status.uptime_s / 3600;
  const up = hours >= 1 ? `${hours.toFixed(1)} h` : `${(status.uptime_s / 60).toFixed(0)} min`;
  $("about").textContent = `version ${status.version} · up ${up} · policy ${status.policy} · internal TLS ${status.internal_tls.split(":")[0]}`;
}

const WRONG_KEY = 401;

function stored(name) {
  try { return sessionStorage.getItem(name); } catch { return null; } // there may be no storage
}

async function fetchJson(path) {
  const headers = { accept: "application/json" }, key = stored("prfaas-key");
  if (key) headers.authorization = `Bearer ${key}`;
  const answer = await fetch(path, { cache: "no-store", headers });
  if (answer.status === WRONG_KEY) return null;
  if (!answer.ok) throw new Error(`${path} answers ${answer.status}`);
  return answer.json();
}

async function poll() {
  clearTimeout(timer);
  try {
    const [status, recent] = await Promise.all([fetchJson("status"), fetchJson(`requests?limit=${MAX_REQUESTS}`)]);
    const requests = recent ? recent.requests : [];
    note(status);
    drawHead(status);
    drawTiles(status, requests);
    drawTopology(status);
    drawPlan(status);
    drawRouting(status);
    if (recent) drawRequests(requests);
    else askForKey();
    drawTables(status);
    document.body.dataset.drawn = String(Number(document.body.dataset.drawn || 0) + 1);
  } catch (error) {
    say("bad", `the gateway does not answer: ${error.message}`);
  }
  if (!paused && !document.hidden) timer = setTimeout(poll, PERIOD_MS);
}

function setTheme(choice) {
  const dark = choice === "dark" || (choice === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").textContent = `Theme: ${choice}`;
  $("theme").dataset.choice = choice;
}

function remembered() {
  try { return localStorage.getItem("prfaas-theme") || "auto"; } catch { return "auto"; }
}

setTheme(remembered());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme($("theme").dataset.choice));
$("theme").addEventListener("click", () => {
  const next = { auto: "dark", dark: "light", light: "auto" }[$("theme").dataset.choice];
  try { localStorage.setItem("prfaas-theme", next); } catch { /* private windows keep nothing */ }
  setTheme(next);
});
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  $("pause").textContent = paused ? "Go on" : "Pause";
  if (!paused) poll();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden && !paused) poll(); });
replace($("parts-legend"), ...[...TTFT_PARTS, "transfer_wait", "transfer", "decode_queue", "first_step", "decode"].map((part) =>
  h("li", {}, h("i", { style: { background: `var(--p-${part})` } }), PART_NAMES[part])));
poll();
