"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const settings = data.spelling;
  const byId = (id) => document.getElementById(id);

  // ---- Tables: gzip in base64. "<i4" are differences. ----

  async function bytesOf(name) {
    const text = atob(byId("table-" + name).textContent);
    const packed = new Uint8Array(text.length);
    for (let n = 0; n < text.length; n++) packed[n] = text.charCodeAt(n);
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }
  async function integers(name) {
    const found = new Int32Array((await bytesOf(name)).buffer);
    for (let n = 1; n < found.length; n++) found[n] += found[n - 1];
    return found;
  }
  const json = async (name) => JSON.parse(new TextDecoder().decode(await bytesOf(name)));
  const has = (name) => byId("table-" + name) !== null;

  // ---- Tokens as people read them, as `readable` of the library. ----

  const byteOf = new Map(); // character of GPT-2's alphabet -> byte
  const charOf = []; // and back
  {
    const printable = (b) => (b > 0x20 && b < 0x7f) || (b > 0xa0 && b !== 0xad);
    let next = 0x100;
    for (let b = 0; b < 256; b++) {
      charOf[b] = String.fromCodePoint(printable(b) ? b : next++);
      byteOf.set(charOf[b], b);
    }
  }
  const encoder = new TextEncoder();
  const toBytes = (text) => Array.from(encoder.encode(text), (b) => charOf[b]).join("");

  function decoded(bytes) {
    const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
    const parts = [];
    for (let n = 0; n < bytes.length; ) {
      const first = bytes[n];
      const size = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
      try {
        parts.push(strict.decode(bytes.subarray(n, n + size)));
        n += size;
      } catch {
        parts.push(`<0x${first.toString(16).toUpperCase().padStart(2, "0")}>`);
        n += 1;
      }
    }
    return parts;
  }
  const escapes = { " ": "␣", "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r" };
  function readableCharacter(char) {
    if (char in escapes) return escapes[char];
    if (!/[\p{C}\p{Z}]/u.test(char)) return char;
    const code = char.codePointAt(0).toString(16);
    return code.length > 4 ? "\\U" + code.padStart(8, "0") : "\\u" + code.padStart(4, "0");
  }
  function readable(token) {
    let parts = [...token];
    if (settings.bytes && parts.every((char) => byteOf.has(char))) {
      parts = decoded(Uint8Array.from(parts, (char) => byteOf.get(char)));
      return parts.map((p) => (/^<0x..>$/.test(p) ? p : readableCharacter(p))).join("");
    }
    if (!settings.bytes && !settings.wordpiece) {
      const byte = /^<0x([0-7][0-9A-F])>$/.exec(token);
      parts = byte ? [String.fromCharCode(parseInt(byte[1], 16))] : [...token.replaceAll("▁", " ")];
    }
    return parts.map(readableCharacter).join("");
  }

  // ---- The tokenizer: normalizer, pre-tokenizer, BPE over the tokens that are kept. ----

  class Vocabulary {
    constructor(tokens, products, lefts) {
      this.tokens = tokens;
      this.ids = new Map();
      tokens.forEach((token, id) => token && this.ids.set(token, id));
      this.lefts = lefts;
      this.patterns = new Map();
      this.ranks = new Int32Array(products.length); // of the merges of each token, by token
      this.start = new Int32Array(tokens.length + 1);
      for (const id of products) this.start[id + 1]++;
      for (let id = 0; id < tokens.length; id++) this.start[id + 1] += this.start[id];
      const next = this.start.slice();
      products.forEach((id, rank) => (this.ranks[next[id]++] = rank));
      this.steps = settings.pre_tokenizer.map((step) =>
        step.split ? { split: new RegExp(step.split[0], "gu"), rule: step.split } : step);
    }

    /** The rank of the merge of two neighbours; Infinity where there is none, or it is removed. */
    rank(left, right, kept) {
      const id = this.ids.get(left + right);
      if (id === undefined || !kept(id)) return Infinity;
      for (let n = this.start[id + 1] - 1; n >= this.start[id]; n--) {
        if (this.lefts[this.ranks[n]] === left.length) return this.ranks[n];
      }
      return Infinity;
    }

    characters(word, kept) {
      const found = [];
      for (const char of word) {
        const id = this.ids.get(char);
        if (id !== undefined && kept(id)) {
          found.push(char);
          continue;
        }
        const bytes = settings.byte_fallback
          ? Array.from(encoder.encode(char), (b) => `<0x${b.toString(16).toUpperCase().padStart(2, "0")}>`)
          : [];
        if (bytes.length && bytes.every((name) => this.ids.has(name))) found.push(...bytes);
        else if (settings.unknown !== null) {
          const name = this.tokens[settings.unknown];
          if (!settings.fuse_unk || found.at(-1) !== name) found.push(name);
        }
      }
      return found;
    }

    bpe(word, kept) {
      const whole = this.ids.get(word);
      if (settings.ignore_merges && whole !== undefined && kept(whole)) return [whole];
      const parts = this.characters(word, kept);
      const ranks = [];
      for (let n = 0; n + 1 < parts.length; n++) ranks.push(this.rank(parts[n], parts[n + 1], kept));
      for (;;) {
        let best = -1;
        let least = Infinity;
        for (let n = 0; n < ranks.length; n++) if (ranks[n] < least) least = ranks[(best = n)];
        if (best < 0) break;
        parts.splice(best, 2, parts[best] + parts[best + 1]);
        ranks.splice(best, 1);
        if (best > 0) ranks[best - 1] = this.rank(parts[best - 1], parts[best], kept);
        if (best < ranks.length) ranks[best] = this.rank(parts[best], parts[best + 1], kept);
      }
      return parts.map((part) => this.ids.get(part));
    }

    /** Split a text at the added tokens that are kept: texts, and ids. */
    *sections(text, kept) {
      const pattern = this.addedPattern(settings.added.filter(kept));
      let end = 0;
      for (const match of pattern ? text.matchAll(pattern) : []) {
        if (match.index > end) yield text.slice(end, match.index);
        yield this.ids.get(match[0]) ?? this.ids.get(match[0].trim());
        end = match.index + match[0].length;
      }
      if (end < text.length) yield text.slice(end);
    }

    /** What matches the added tokens; the longest first. Made once for each number of them. */
    addedPattern(added) {
      if (!added.length) return null;
      if (this.patterns.has(added.length)) return this.patterns.get(added.length);
      const names = added.map((id) => this.tokens[id]).sort((a, b) => b.length - a.length);
      const space = "\\p{White_Space}*";
      const escaped = names.map((name) => {
        const id = this.ids.get(name);
        const exact = name.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
        return (settings.lstrip.includes(id) ? space : "") + exact + (settings.rstrip.includes(id) ? space : "");
      });
      const made = new RegExp(escaped.join("|"), "gu");
      this.patterns.set(added.length, made);
      return made;
    }

    encode(text, kept) {
      const ids = [];
      for (const section of this.sections(text, kept)) {
        if (typeof section === "number") ids.push(section);
        else for (const word of this.words(normalized(section))) ids.push(...this.bpe(word, kept));
      }
      return ids;
    }

    words(text) {
      let parts = [text];
      for (const step of this.steps) {
        if (step.split) parts = parts.flatMap((part) => split(part, step.split, step.rule[1], step.rule[2]));
        else if (step.bytes) parts = parts.map(toBytes);
        else if (step.mark) parts = parts.map((part) => part.replaceAll(" ", step.mark));
        else if (step.prefix) parts = parts.map((p) => (p.startsWith(step.prefix) ? p : step.prefix + p));
      }
      return parts.filter((part) => part);
    }
  }

  function normalized(text) {
    for (const step of settings.normalizer) {
      if (step.replace) text = text.replace(new RegExp(step.replace[0], "gu"), () => step.replace[1]);
      else if (step.prepend) text = text && step.prepend + text;
      else if (step.form) text = text.normalize(step.form);
      else if (step.lowercase) text = text.toLowerCase();
    }
    return text;
  }

  function split(text, pattern, behavior, invert) {
    const found = [];
    let end = 0;
    for (const match of text.matchAll(pattern)) {
      if (!match[0]) continue;
      if (match.index > end) found.push([text.slice(end, match.index), invert]);
      found.push([match[0], !invert]);
      end = match.index + match[0].length;
    }
    if (end < text.length) found.push([text.slice(end), invert]);
    if (behavior === "Removed") return found.filter((f) => !f[1]).map((f) => f[0]);
    if (behavior === "Isolated") return found.map((f) => f[0]);
    const next = behavior === "MergedWithNext";
    if (next) found.reverse();
    const joined = [];
    let before = false;
    for (const [part, matches] of found) {
      if (matches && !before && joined.length) {
        joined.push(next ? part + joined.pop() : joined.pop() + part);
      } else joined.push(part);
      before = matches;
    }
    return next ? joined.reverse() : joined;
  }

  // ---- Which tokens are kept: by the plan, or by the size that the sliders say. ----

  let vocabulary = null; // loaded on first use
  let place = null; // id -> place in the order of rarity
  let keptBits = null;
  let size = null; // V' of the sliders
  const all = () => true;
  function kept(id) {
    if (id >= data.rows) return true;
    return place ? place[id] < size : (keptBits[id >> 3] >> (id & 7)) & 1;
  }
  let newIds = null;
  function newId(id) {
    if (!newIds) {
      newIds = new Int32Array(vocabulary.tokens.length + 1);
      for (let n = 0; n < vocabulary.tokens.length; n++) newIds[n + 1] = newIds[n] + (kept(n) ? 1 : 0);
    }
    return newIds[id];
  }

  let loading = null;
  function load() {
    loading ??= (async () => {
      const able = has("products");
      const [tokens, products, lefts, bits, groups] = await Promise.all([
        json("tokens"), able ? integers("products") : new Int32Array(0),
        able ? bytesOf("lefts") : new Uint8Array(0), bytesOf("kept"), bytesOf("groups"),
      ]);
      vocabulary = new Vocabulary(tokens, products, new Uint16Array(lefts.buffer, 0, lefts.length >> 1));
      vocabulary.groups = groups;
      keptBits = bits;
      if (has("order")) await loadOrder();
    })();
    return loading;
  }
  async function loadOrder() {
    const order = await integers("order");
    place = new Int32Array(order.length);
    order.forEach((id, n) => (place[id] = n));
  }

  // ---- Search ----

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }
  const number = (value) => Math.round(value).toLocaleString("en-US");

  function pieces(ids, marks, what) {
    const line = element("div", { class: "pieces", dir: "auto" });
    ids.forEach((id, n) => {
      const name = `piece p${n % 4}` + (marks(id) ? " " + what : "");
      line.append(element("span", { class: name, title: `token ${id}` }, readable(vocabulary.tokens[id])),
        document.createElement("wbr"));
    });
    return line;
  }

  function tokenLine(id) {
    const stays = kept(id);
    const status = element("span", { class: stays ? "status" : "status removed" }, stays ? "kept" : "removed");
    const group = data.groups[vocabulary.groups[id]] ?? "no token";
    const where = stays ? ` token ${number(id)}, after the cut ${number(newId(id))}; ${group}` : ` token ${number(id)}; ${group}`;
    return element("p", { class: "token", "data-id": id, "data-kept": stays ? "1" : "0" },
      status, " ", element("code", {}, element("bdi", {}, readable(vocabulary.tokens[id]))), where);
  }

  function search() {
    const text = byId("query").value;
    const found = byId("found");
    found.replaceChildren();
    found.dataset.query = text;
    delete found.dataset.before;
    delete found.dataset.after;
    if (!text) return;
    const spaced = byId("spaced").checked;
    const whole = spaced && !/^\s/.test(text) ? " " + text : text;
    const spell = (t) => (settings.bytes ? toBytes(t) : t.replaceAll(" ", "▁"));
    const names = new Set([text, spell(text), spell(whole), "##" + text]);
    const exact = [...names].map((n) => vocabulary.ids.get(n)).filter((id) => id !== undefined);
    for (const id of new Set(exact)) found.append(tokenLine(id));
    if (settings.cannot.length) {
      const lacks = settings.cannot.join(", ");
      found.append(element("p", { class: "cannot" },
        (exact.length ? "" : "No token is spelled like this. ")
        + `The page cannot tokenize text of this model, for it lacks ${lacks}.`));
      return;
    }
    const before = vocabulary.encode(whole, all);
    const after = vocabulary.encode(whole, kept);
    const gone = before.filter((id) => !kept(id)).length;
    const old = new Set(before);
    found.dataset.before = before.join(" ");
    found.dataset.after = after.join(" ");
    const said = gone
      ? `${number(before.length)} → ${number(after.length)} tokens: ${gone === 1 ? "1 of them is" : `${number(gone)} of them are`} removed, and spelled by others.`
      : `${number(before.length)} token${before.length === 1 ? "" : "s"}, all kept: nothing changes.`;
    found.append(element("p", { class: "said" }, said));
    const shown = (ids) => ids.slice(0, 2000);
    const side = (title, line) => element("div", {}, element("h3", {}, title), line);
    found.append(element("div", { class: "two" },
      side("before", pieces(shown(before), (id) => !kept(id), "gone")),
      side("after", pieces(shown(after), (id) => !old.has(id), "new"))));
    const lossy = before.includes(settings.unknown);
    if (lossy) found.append(element("p", { class: "note" }, "Some characters have no token: they become the unknown token."));
  }

  async function startSearch() {
    const section = byId("search");
    if (!section || !settings) return;
    if (typeof DecompressionStream === "undefined") return;
    section.hidden = false;
    section.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
    const run = async () => {
      await load();
      search();
    };
    byId("query").addEventListener("input", run);
    byId("spaced").addEventListener("change", run);
  }

  // ---- What if ----

  const choices = data.choices;
  const state = {};
  let shares = null;
  let words = null;

  function slider(key, label, stops, text) {
    const id = "slide-" + key;
    const output = element("output", { for: id, id: id + "-value" });
    const input = element("input", { type: "range", id, min: 0, max: stops.length - 1, step: 1 });
    input.addEventListener("input", () => {
      state[key] = Number(input.value);
      follow();
    });
    input.show = () => {
      input.value = state[key];
      output.textContent = text(stops[state[key]]);
      input.setAttribute("aria-valuetext", output.textContent);
    };
    const box = element("div", {}, element("label", { for: id }, output, label), input);
    box.hidden = stops.length < 2;
    return [box, input];
  }

  const chosen = () => ({
    vocab: choices.vocab[state.vocab], widths: choices.widths[state.widths],
    experts: choices.experts[state.experts], layers: choices.layers[state.layers],
  });
  const keptLayers = (count) => new Set(choices.influence.slice(0, count));

  function total(name) {
    const { vocab, layers } = chosen();
    const table = choices[name];
    let sum = table.rest - (data.rows - vocab) * table.row;
    for (const layer of keptLayers(layers)) sum += table.kinds[choices.kind_of[layer]][state.experts][state.widths];
    return sum;
  }

  /** Tokens of the text at the size of the sliders, by script: [script, before, after, bytes]. */
  function growth() {
    return words.scripts.map((script, s) => {
      let before = words.constant[s];
      let after = before;
      words.words[s].forEach((word, n) => {
        const count = words.counts[s][n];
        before += count * words.lengths[s][n];
        const changed = words.needs[s][n] >= size;
        after += count * (changed ? vocabulary.bpe(word, kept).length : words.lengths[s][n]);
      });
      return [script, before, after, words.nbytes[s]];
    });
  }
  async function loadWords() {
    words = await json("words");
    await load();
    words.lengths = [];
    words.needs = [];
    for (const list of words.words) {
      const lengths = new Int32Array(list.length);
      const needs = new Int32Array(list.length);
      list.forEach((word, n) => {
        const ids = vocabulary.bpe(word, all);
        lengths[n] = ids.length;
        needs[n] = Math.max(-1, ...ids.map((id) => (id < data.rows ? place[id] : -1)));
      });
      words.lengths.push(lengths);
      words.needs.push(needs);
    }
  }

  /** Whether nearly nothing is left of a script, as in surgery/report/vocabulary.py. */
  const vanishes = ([, before, after]) => 1 - after / before >= 0.95;

  function lostScripts() {
    const before = new Map();
    const after = new Map();
    vocabulary.groups.forEach((group, id) => {
      const name = data.groups[group];
      if (name === undefined) return;
      before.set(name, (before.get(name) ?? 0) + 1);
      if (kept(id)) after.set(name, (after.get(name) ?? 0) + 1);
    });
    return [...before].map(([name, count]) => [name, count, after.get(name) ?? 0])
      .sort((a, b) => b[1] - b[2] - (a[1] - a[2]) || b[1] - a[1]);
  }

  const rounded = (value) => (Math.floor(1000 * value + 0.5) / 10).toFixed(1);
  const percent = (value) => `${rounded(value)}\u00a0%`;
  const signed = (value) => `${rounded(value) < 0 ? "" : "+"}${rounded(value)}\u00a0%`;
  function sized(nbytes) {
    let n = 0;
    for (; nbytes >= 1000 && n < 4; n++) nbytes /= 1000;
    return `${nbytes.toFixed(n ? 1 : 0)} ${["bytes", "kB", "MB", "GB", "TB"][n]}`;
  }
  function tile(name, value, about, exact) {
    const shown = element("dd", exact === undefined ? {} : { "data-exact": exact }, value, element("small", {}, about));
    return element("div", { "data-name": name }, element("dt", {}, name), shown);
  }
  function tabled(heads, rows) {
    const head = element("tr", {}, ...heads.map((h, n) => element("th", { scope: "col", class: n ? "n" : "" }, h)));
    const body = rows.map((row) => element("tr", {}, ...row.map((cell, n) =>
      n ? element("td", { class: "n" }, cell) : element("th", { scope: "row" }, cell))));
    return element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
  }

  /** The commands that make the chosen sizes; at this page's cut, those of "Make it". */
  function commands() {
    if (atStart()) return choices.made_by.join("\n") || NOTHING;
    const { vocab, widths, experts, layers } = chosen();
    const options = choices.family ? [`--family ${quoted(choices.family)}`] : [];
    if (vocab !== data.rows) options.push(`--vocab-size ${vocab}`);
    const full = choices.widths.at(-1);
    for (const key of Object.keys(widths)) {
      if (widths[key] === full[key]) continue;
      options.push(choices.main_width === key ? `--intermediate-size ${widths[key]}` : `--width ${key}=${widths[key]}`);
    }
    if (experts !== choices.experts.at(-1)) options.push(`--num-experts ${experts}`);
    if (layers !== choices.layers.at(-1)) options.push(`--num-hidden-layers ${layers}`);
    if (options.length === (choices.family ? 1 : 0)) return NOTHING;
    return `compact-surgery plan ${quoted(choices.model)} --stats ${quoted(choices.stats)} ${options.join(" ")}`
      + ` -o ${choices.plan}\ncompact-surgery apply ${choices.plan} -o DIR`;
  }
  const NOTHING = "Nothing is removed: move a slider.";
  const atStart = () => state.vocab === choices.start.vocab
    && state.widths === choices.start.widths && state.experts === choices.start.experts
    && choices.layers[state.layers] === choices.start.layers;
  const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\"'\"'")}'`);

  function shareRows() {
    const stays = keptLayers(chosen().layers);
    const per = choices.rows.length;
    const first = ((state.vocab * choices.experts.length + state.experts) * choices.widths.length + state.widths) * per;
    return choices.rows.map(([layer, axis], n) => [layer, axis, shares[first + n]])
      .filter(([layer]) => stays.has(layer));
  }

  function follow() {
    size = choices.vocab[state.vocab];
    newIds = null;
    const outcome = byId("outcome");
    const parameters = total("parameters");
    const nbytes = total("nbytes");
    const whole = choices.whole;
    const tiles = [
      tile("parameters", `${(parameters / 1e6).toFixed(1)} M`, `${percent(1 - parameters / whole.parameters)} removed`, parameters),
      tile("weights on disk", sized(nbytes), `of ${sized(whole.nbytes)}`, nbytes),
      tile("tokens kept", percent(size / data.rows), `${number(size)} of ${number(data.rows)}`, size),
    ];
    let grown = [];
    if (words) {
      grown = growth();
      const [before, after] = [1, 2].map((n) => grown.reduce((sum, row) => sum + row[n], 0));
      const counted = grown.reduce((sum, row) => sum + row[3], 0);
      const about = `tokens, ${number(before)} → ${number(after)}`
        + (counted < data.text_bytes ? `, in its first ${sized(counted)}` : "");
      tiles.push(tile("your text takes", signed(after / before - 1), about, after));
    }
    const rows = shareRows();
    if (rows.length) {
      const least = rows.reduce((a, b) => (b[2] < a[2] ? b : a));
      const mean = rows.reduce((sum, row) => sum + row[2], 0) / rows.length;
      tiles.push(tile("act² kept in layers", percent(mean), least[2] < 1 ? `lower is worse; least in layer ${least[0]}: ${percent(least[2])}` : "all channels are kept", mean));
      showLayers(rows, mean);
    }
    outcome.replaceChildren(...tiles);
    // For screen readers, in one sentence: the tiles are replaced at each step.
    byId("outcome-said").textContent = tiles.map((each) =>
      `${each.dataset.name} ${each.querySelector("dd").firstChild.textContent}`).join(", ");
    const byScript = new Map(grown.map((row) => [row[0], row]));
    const all = lostScripts().filter((row) => row[1] > row[2]);
    const lost = all.slice(0, 10);
    const gone = all.filter(vanishes).map(([name]) => name).filter((name) => data.scripts.includes(name));
    byId("outcome-vanished").textContent = gone.length
      ? `Nearly all tokens (95 % or more) are removed of ${gone.slice(0, 12).join(", ")}`
        + (gone.length > 12 ? `, and ${gone.length - 12} more.` : ".")
      : "";
    const text = (name) => {
      const row = byScript.get(name);
      return row && row[1] ? signed(row[2] / row[1] - 1) : "";
    };
    byId("outcome-scripts").replaceChildren(lost.length
      ? tabled(["script", "tokens", "kept", "removed", ...(words ? ["your text"] : [])],
        lost.map(([name, before, after]) => [name, number(before), number(after), percent(1 - after / before),
          ...(words ? [text(name)] : [])]))
      : "All tokens are kept.");
    byId("outcome-command").textContent = commands();
    for (const input of inputs) input.show();
    for (const button of document.querySelectorAll(".marks button")) {
      button.setAttribute("aria-pressed", button.same() ? "true" : "false");
    }
    if (byId("query")?.value) search();
  }

  function showLayers(rows, mean) {
    const svg = (tag, attributes) => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
      return made;
    };
    const step = 100 / rows.length;
    const chart = svg("svg", { viewBox: "0 0 100 40", preserveAspectRatio: "none", class: "shares", role: "img",
      "aria-label": `share of act² kept in each layer, ${percent(mean)} on average; the table has the numbers` });
    rows.forEach(([, , share], n) => {
      chart.append(svg("rect", { class: "gone", x: n * step, width: step * 0.85, y: 0, height: 40 }));
      chart.append(svg("rect", { class: "kept", x: n * step, width: step * 0.85, y: 40 - 40 * share, height: 40 * share }));
    });
    const open = byId("outcome-layers").querySelector("details")?.open;
    const details = element("details", {}, element("summary", {}, "The same as a table"),
      tabled(["layer", "act² kept"], rows.map(([layer, axis, share]) =>
        [axis === "ffn" ? `${layer}` : `${layer} (${axis})`, `${(100 * share).toFixed(2)} %`])));
    details.open = Boolean(open);
    byId("outcome-layers").replaceChildren(chart, details);
  }

  let inputs = [];
  async function startChoosing() {
    if (!choices || typeof DecompressionStream === "undefined") return;
    const box = byId("choose");
    const made = [
      slider("vocab", "V′: tokens kept", choices.vocab, number),
      slider("widths", "I′: FFN channels kept", choices.widths,
        (widths) => Object.values(widths).map(number).join(", ")),
      slider("experts", "E′: experts kept of each layer", choices.experts, number),
      slider("layers", "layers kept", choices.layers, number),
    ];
    box.querySelector(".sliders").append(...made.map(([part]) => part));
    inputs = made.map(([, input]) => input);
    const start = { vocab: choices.start.vocab, widths: choices.start.widths, experts: choices.start.experts,
      layers: choices.layers.indexOf(choices.start.layers) };
    const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
    const places = [["this page's cut", start], ...choices.marks.map((mark) => [mark.name, {
      vocab: choices.vocab.indexOf(mark.vocab), widths: choices.widths.findIndex((w) => same(w, mark.widths)),
      experts: choices.experts.indexOf(mark.experts), layers: choices.layers.length - 1 }])];
    for (const [name, sizes] of places) {
      const button = element("button", { type: "button" }, name);
      button.same = () => Object.keys(sizes).every((key) => state[key] === sizes[key]);
      button.addEventListener("click", () => {
        Object.assign(state, sizes);
        follow();
      });
      box.querySelector(".marks").append(button);
    }
    byId("copy").addEventListener("click", copy);
    Object.assign(state, start);
    size = choices.vocab[state.vocab];
    shares = new Float32Array((await bytesOf("shares")).buffer);
    if (settings) await load();
    if (has("words")) await loadWords();
    box.hidden = false;
    follow();
    box.dataset.ready = "1";
  }

  async function copy() {
    const text = byId("outcome-command").textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const range = document.createRange();
      range.selectNodeContents(byId("outcome-command"));
      const selection = getSelection();
      selection.removeAllRanges();
      selection.addRange(range);
      document.execCommand("copy");
    }
    byId("copy").textContent = "Copied";
    setTimeout(() => (byId("copy").textContent = "Copy"), 1500);
  }

  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
  startSearch();
  // After the first paint, so that the page opens at once.
  setTimeout(startChoosing, 0);
})();
