"use strict";
// Text of models and prompts only ever becomes textContent.
const $ = (id) => document.getElementById(id);
const make = (tag, kind = "", text = "", ...inner) => {
	const node = document.createElement(tag);
	node.className = kind;
	node.textContent = text;
	node.append(...inner);
	return node;
};
const named = (node, name, role) => {
	node.setAttribute("aria-label", name);
	if (role) node.setAttribute("role", role);
	return node;
};
const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const wide = (node, share) => { node.style.width = `${100 * share}%`; return node; };
const many = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
const facts = (all) => all.map(([name, value]) => make("li", "", value, make("small", "", name)));
const way = (n) => (n === 1 ? "AR" : `blocks of ${n}`);
const shown = (id) => header.eos_token_ids.includes(id) ? "⊣" : (texts[id] ?? "#" + id).replace(/^ +| +$/g, (s) => "␣".repeat(s.length))
	.replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";
const MODES = {
	ar: ["AR", "one token a forward"],
	diffusion: ["Diffusion", "fills a masked block"],
	linear_spec: ["Self-speculation", "drafts a block, then verifies it"],
	quadratic_spec: ["Quadratic", "verifies and drafts in one forward"],
	auto: ["Auto", "AR or self-speculation, by time"],
};
const LETTERS = { prefill: "P", decode: "A", denoise: "N", draft: "D", verify: "V", quadratic: "Q" };

let lanes = [], texts = {}, header, modes = Object.keys(MODES);
let at = 0, speed = 1, since = 0, playing = false, live = false, job = null, due = 0;

// A lane after its first steps

function fold(lane, end) {
	const s = { base: lane.start.prompt_ids.length, text: [], block: new Map(), gone: [], tops: {}, shared: 0, piece: "" };
	lane.steps.slice(0, end).forEach((f, i) => apply(s, f, i));
	return s;
}

function apply(s, f, step) {
	const { past_length: past = 0, input_ids: ids = [], positions = [], drafted = [], committed = [] } = f;
	const length = s.base + s.text.length, how = f.phase === "draft" ? "drafted" : "filled";
	const old = f.graph === "draft" || f.phase === "prefill" ? s.block : new Map();
	s.block = new Map(f.phase === "prefill" ? old : []);
	if (f.graph === "draft") ids.forEach((id, i) => {
		if (past + i >= length) s.block.set(past + i, { id, sure: old.get(past + i)?.sure,
			how: id === header.mask_token_id ? "masked" : how });
	});
	for (const { position, token_id: id, confidence: sure, top = [] } of positions) {
		s.tops[position] = top;
		if (id !== undefined && position >= length + committed.length)
			s.block.set(position, { id, sure, fresh: true, how: f.graph === "quadratic" ? "drafted" : how });
	}
	if (!step) s.shared = past;
	s.right = past + 1 + (f.accepted || 0);
	committed.forEach((id) => s.text.push({ id, step, judged: drafted.length > 0 }));
	s.gone = f.rejected ? drafted.slice(f.accepted) : [];
	s.cached = f.cached_length;
	s.piece += f.text || "";
	s.step = step;
}

function say(f) {
	const open = f.positions?.length, kept = many(f.committed?.length, "token");
	const filled = f.positions?.filter((one) => one.token_id !== undefined).length;
	const drafts = f.drafted?.length, spare = drafts - f.accepted - f.rejected;
	const checks = `${drafts} drafts: ${f.accepted} right, ${f.rejected} wrong, ${spare} not needed; ${kept} kept`;
	const what = {
		prefill: `reads ${many(f.input_ids?.length, "prompt token")}` + (f.past_length ? `, ${f.past_length} were cached` : ""),
		decode: "one forward, one token",
		denoise: `fills ${filled} of ${many(open, "masked position")}`,
		draft: `guesses ${many(filled, "token")} at once`,
		commit: `caches the finished block: ${kept}`,
		verify: checks, quadratic: checks,
	}[f.phase] || kept + " without a forward";
	return `${f.phase || "commit"}: ${what}` +
		(f.switch ? `. From ${way(f.switch.before)} to ${way(f.switch.after)}: ${f.switch.reason}` : "");
}

function cellsOf(s) {
	const cells = [{ kind: "prompt" + (s.shared ? " shared" : ""), text: `prompt ${s.base}`,
		label: `prompt of ${s.base} tokens, ${s.shared} of them cached before` }];
	const add = (p, id, how, more = "", sure) => cells.push({ p, sure, top: s.tops[p], kind: `${how} ${more}`,
		text: how === "masked" ? "·" : shown(id), label: (how === "masked" ? "" : shown(id) + ", ") + `${how}, position ${p}` });
	s.text.forEach(({ id, step, judged }, i) => {
		const p = s.base + i, now = step === s.step;
		if (now && judged) return add(p, id, p < s.right ? "accepted" : "chosen");
		add(p, id, "committed", (s.text[i - 1]?.step === step ? "" : "first ") + (s.text[i + 1]?.step === step ? "" : "last ") +
			(p < s.cached ? "" : "wet ") + (now ? "fresh" : ""));
	});
	s.gone.forEach((id, i) => add(s.right + i, id, "rejected"));
	for (const [p, { id, how, sure, fresh }] of s.block) add(p, id, how, fresh ? "fresh" : "", sure);
	return cells;
}

// Drawing

function addLane(mode) {
	const lane = { mode, nodes: [] }, pick = named(make("select"), "Mode of the lane");
	for (const one of modes) pick.add(new Option(MODES[one][0], one, false, one === mode));
	pick.onchange = () => { lane.mode = pick.value; reset(lane); draw(); };
	lane.about = make("p");
	lane.facts = facts([["tokens", "–"], ["forwards", "–"], ["per forward", "–"], ["ms", "–"]]);
	lane.strip = make("div", "strip");
	lane.says = make("p", "says");
	lane.cells = named(make("div", "cells"), "Tokens", "list");
	lane.text = named(make("p", "text"), "Text", "group");
	lane.node = make("section", "", "", make("header", "", "", pick, lane.about), make("ul", "facts", "", ...lane.facts),
		lane.strip, lane.says, lane.cells, lane.text);
	$("lanes").append(lane.node);
	lanes.push(lane);
	reset(lane);
	return lane;
}

function reset(lane) {
	Object.assign(lane, { start: null, steps: [], end: null, error: "" });
	lane.strip.replaceChildren();
	named(lane.node, MODES[lane.mode][0]).className = "lane " + lane.mode;
	put(lane.about, MODES[lane.mode][1]);
}

const isTime = () => $("clock").value === "ms";
const ends = (lane) => lane.steps.map((f, i) => (isTime() ? f.end_ms : i + 1));
const span = () => Math.max(0.001, ...lanes.map((lane) => ends(lane).at(-1) || 0));

function draw() {
	due = 0;
	const all = span();
	if (live) at = all;
	$("seek").value = (1000 * at) / all;
	put($("now"), isTime() ? `${at.toFixed(1)} of ${all.toFixed(1)} ms` : `forward ${Math.floor(at)} of ${Math.floor(all)}`);
	for (const lane of lanes) drawLane(lane, all);
}
const soon = () => (due = due || requestAnimationFrame(draw));

function drawLane(lane, all) {
	const n = ends(lane).filter((t) => t <= at + 1e-9).length, f = lane.steps[n - 1];
	const s = lane.start && fold(lane, n), over = lane.end && n === lane.steps.length;
	const nfe = lane.steps.slice(0, n).findLast((one) => one.nfe)?.nfe || 0, size = s ? s.text.length : 0;
	[size, nfe, nfe ? (size / nfe).toFixed(2) : "–", f ? f.end_ms.toFixed(1) : "–"]
		.forEach((value, i) => (lane.facts[i].firstChild.data = value));
	put(lane.says, lane.error || (f ? say(f) + (over ? `. Done (${lane.end.error || lane.end.finish_reason}).` : "") : ""));
	put(lane.text, s ? s.piece + (over ? lane.end.text || "" : "") : "");
	drawCells(lane, s ? cellsOf(s) : []);
	lane.steps.forEach((one, i) => {
		const node = lane.strip.children[i] || lane.strip.appendChild(make("i", "", LETTERS[one.phase] || "C"));
		const share = (isTime() ? one.ms || 0 : 1) / all;
		node.className = (one.phase || "commit") + (i < n ? "" : " later");
		wide(node, share).style.left = `${100 * ((isTime() ? one.end_ms : i + 1) / all - share)}%`;
		node.style.fontSize = share < 0.025 ? 0 : "";
	});
}

function drawCells(lane, cells) {
	cells.forEach((cell, i) => {
		const node = lane.nodes[i] || (lane.nodes[i] = lane.cells.appendChild(named(make("span", "", "", "", make("u")), "", "listitem")));
		const key = cell.kind + cell.label + cell.sure;
		if (node.key !== key) {
			node.key = key;
			named(node, cell.label).className = "cell " + cell.kind;
			node.tabIndex = i ? -1 : 0;
			node.firstChild.data = cell.text;
			wide(node.lastChild, cell.sure || 0);
		}
		node.top = cell.top;
	});
	for (const node of lane.nodes.splice(cells.length)) node.remove();
}

// The player

function seek(time) { live = false; at = Math.min(Math.max(0, time), span()); draw(); }
function hold(on) {
	playing = on;
	named($("play"), on ? "Pause" : "Play").textContent = on ? "❚❚" : "▶";
	for (const lane of lanes) lane.says.ariaLive = on ? "off" : "polite";
}
function jump(time) { hold(false); seek(time); }
function step(by) {
	const times = [0, ...lanes.flatMap(ends)].sort((a, b) => a - b);
	jump((by > 0 ? times.find((t) => t > at + 1e-9) : times.findLast((t) => t < at - 1e-9)) ?? at);
}
function play() {
	if (at >= span()) at = 0;
	hold(true);
	since = performance.now();
	requestAnimationFrame(tick);
}
function tick(now) {
	if (!playing) return;
	seek(at + ((now - since) / 12000) * span() * speed); // all of it takes 12 s at first
	since = now;
	if (at < span()) requestAnimationFrame(tick); else hold(false);
}
function hurry(by) {
	speed = Math.min(16, Math.max(1 / 16, speed * by));
	put($("speed"), (speed < 1 ? "1/" + 1 / speed : speed) + "×");
}

// Traces

function take(lane, record) {
	if (record.kind === "header") header = record;
	else if (record.kind === "texts") Object.assign(texts, record.texts);
	else if (record.kind === "start" || record.kind === "end") lane[record.kind] = record;
	else lane.steps.push(record);
}
function note(text, bad) { put($("note"), text); $("note").className = bad ? "bad" : ""; }

async function ask(path, more) {
	const key = $("key").value, headers = key ? { Authorization: "Bearer " + key } : {};
	const answer = await fetch("watch/" + path, { headers, ...more });
	if (answer.status === 401) $("keyed").hidden = false;
	if (!answer.ok) throw new Error((await answer.json().catch(() => null))?.error?.message || "HTTP " + answer.status);
	return answer;
}

async function runLane(lane, signal) {
	const body = JSON.stringify({ prompt: $("prompt").value, mode: lane.mode, max_tokens: +$("most").value,
		temperature: +$("heat").value, reuse: $("reuse").checked });
	const answer = await ask("trace", { method: "POST", body, signal });
	const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
	for (let rest = "", part; !(part = await reader.read()).done; soon()) {
		const lines = (rest + part.value).split("\n\n");
		rest = lines.pop();
		for (const line of lines) if (line.startsWith("data: ")) take(lane, JSON.parse(line.slice(6)));
	}
	if (!lane.end) throw new Error("expected the whole trace, found a part");
}

async function run() {
	stop();
	const { signal } = (job = new AbortController());
	for (const lane of lanes) reset(lane);
	texts = {};
	live = true;
	note("Decoding …");
	const jobs = lanes.map((lane) => () => runLane(lane, signal).catch((error) => {
		if (!signal.aborted) note((lane.error = error.message), true);
	}));
	if ($("together").checked) await Promise.all(jobs.map((one) => one()));
	else for (const one of jobs) if (!signal.aborted) await one();
	if (signal.aborted) return;
	if (!lanes.some((lane) => lane.error)) note(`${many(lanes.length, "lane")} decoded, ` +
		`${$("together").checked ? "at once" : "one after another"}, shown on one clock.`);
	finish();
}

function stop() { job?.abort(); job = null; live = false; hold(false); }
function finish() {
	seek(0);
	if (matchMedia("(prefers-reduced-motion: reduce)").matches) seek(Infinity); else play();
}

async function open(file) {
	try {
		const records = (await file.text()).split("\n").filter((line) => line.trim()).map((line) => JSON.parse(line));
		if (records[0]?.kind !== "header" || records[0].schema_version !== 1)
			throw new Error("expected a trace of version 1, found another file");
		stop();
		lanes = [];
		$("lanes").replaceChildren();
		texts = {};
		const found = {};
		for (const one of records) {
			if (one.kind === "start") found[one.run] = addLane(one.mode);
			take(found[one.run], one);
		}
		finish();
		note(`Replay of ${many(lanes.length, "run")} of ${header.model}, ${header.precision} on ${header.target}.`);
	} catch (error) { note(`${file.name}: ${error.message}`, true); }
}

// Candidates of a token

const cellOf = (e) => e.target.closest?.(".cells .cell");
function tell(node) {
	const tip = $("tip");
	tip.hidden = !node;
	if (!node) return;
	tip.replaceChildren(make("b", "", node.ariaLabel), ...(node.top || []).map(({ token_id: id, probability: p }) =>
		make("div", "", "", wide(make("u"), p), make("span", "", shown(id)), make("span", "", `${(100 * p).toFixed(1)}%`))));
	const box = node.getBoundingClientRect();
	tip.style.left = `${Math.max(6, Math.min(box.left, innerWidth - 280)) + scrollX}px`;
	tip.style.top = `${box.bottom + 7 + scrollY}px`;
}
for (const kind of ["pointerover", "focusin"]) document.addEventListener(kind, (e) => tell(cellOf(e)));

// The engine

async function engine() {
	const e = await (await ask("engine")).json();
	modes = e.modes;
	put($("model"), `${e.model}, ${e.precision} on ${e.target}.`);
	$("counts").replaceChildren(...facts([["rows at work", `${e.running} of ${e.running + e.free_rows}`], ["waiting", e.waiting],
		["prefix hits", e.hits], ["prompt tokens reused", `${e.cached_tokens} of ${e.prompt_tokens}`],
		["tokens written", e.completion_tokens], ["rows per forward", e.rows_per_forward.toFixed(2)]]));
	const rows = e.rows.map((row) => make("li", row.mode, "", wide(make("u"), row.cached_tokens / (row.capacity || 1)),
		make("b", "", MODES[row.mode][0]), make("span", "", row.is_reading ? "reads its prompt" : way(row.block_length)),
		make("span", "", `${row.cached_tokens} cached, ${row.shared_tokens} shared`)));
	$("rows").replaceChildren(...rows, ...Array.from({ length: e.free_rows }, () => make("li", "free", "free")));
	$("switches").hidden = !e.mode_switches.length;
	$("switches").tBodies[0].replaceChildren(...e.mode_switches.reverse().map((one) => make("tr", "", "",
		...[way(one.before), way(one.after), one.num_rows, one.num_queued, one.reason].map((value) => make("td", "", value)))));
}
async function poll() {
	if (!document.hidden) await engine().catch((error) => job || note(error.message, true));
	setTimeout(poll, 1000);
}

// Hands

const HANDS = {
	back: () => step(-1), next: () => step(1), play: () => (playing ? hold(false) : play()),
	slower: () => hurry(0.5), faster: () => hurry(2),
};
const KEYS = { r: run, " ": HANDS.play, ArrowLeft: HANDS.back, ArrowRight: HANDS.next, "-": HANDS.slower,
	"+": HANDS.faster, "=": HANDS.faster, Home: () => jump(0), End: () => jump(Infinity) };
for (const id in HANDS) $(id).onclick = HANDS[id];
$("ask").onsubmit = (e) => { e.preventDefault(); run(); };
$("seek").oninput = () => jump(($("seek").value / 1000) * span());
$("clock").onchange = () => jump(0);
$("file").onchange = () => { open($("file").files[0]); $("file").value = ""; };
document.addEventListener("keydown", (e) => {
	const cell = cellOf(e), beside = { ArrowRight: "nextSibling", ArrowLeft: "previousSibling" }[e.key];
	if (e.ctrlKey || e.metaKey || e.altKey || e.target.matches("textarea, input, select")) return;
	if (e.key === "Escape") tell();
	if (!KEYS[e.key] || (e.key === " " && e.target.matches("button"))) return;
	e.preventDefault();
	if (cell && beside) cell[beside]?.focus(); else KEYS[e.key]();
});
for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (e) => {
	e.preventDefault();
	if (kind === "drop" && e.dataTransfer.files[0]) open(e.dataTransfer.files[0]);
});
["ar", "diffusion", "linear_spec"].forEach(addLane);
poll();
