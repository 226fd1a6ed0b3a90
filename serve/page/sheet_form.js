/**
 * The form for several images at once: one caption over all values of one or two attributes, or a list of captions.
 */

import { MOST_CHARACTERS } from "./caption.js";
import { labelIn, word } from "./composer.js";
import { button, byId, element } from "./elements.js";
import { keep, kept, lasting } from "./preferences.js";
import { MOST_CELLS, captionsOf, linesOf } from "./sheet.js";
import { language, onLanguage, t } from "./texts.js";

const LINES = "kodalle.lines";

/**
 * @typedef {import("./composer.js").Grammar} Grammar
 * @typedef {import("./sheet.js").Axis} Axis
 * @typedef {{caption: string, axes: Axis[], captions: string[]}} Wanted `captions`: of the cells
 *
 * @typedef {object} State
 * @property {"grid"|"list"} kind
 * @property {string[]} chosen the attributes, as `keyOf` names them
 * @property {Map<string, Set<string>>} left values that are left out, by attribute
 * @property {string} lines
 *
 * @typedef {object} Tools
 * @property {Grammar|null} grammar
 * @property {State} state
 * @property {() => void} show
 * @property {() => void} showCount
 */

/**
 * Shows the form; until then the page has none.
 * @param {Grammar|null} grammar of the served model; null: there is no grid, only the list
 * @param {import("./caption.js").CaptionBox} captionBox
 * @param {{numCandidates: () => number, submit: (wanted: Wanted) => void}} options
 */
export function startSheetForm(grammar, captionBox, { numCandidates, submit }) {
  /** @type {State} */
  const state = { kind: grammar ? "grid" : "list", chosen: [], left: new Map(), lines: kept(lasting(), LINES) };
  if (grammar) state.chosen = [firstAttribute(grammar, captionBox.read()), ""];

  const wanted = () => wantedOf(grammar, state, captionBox.read());
  const showCount = () => {
    const { captions } = wanted();
    const fault = faultOf(state, captions);
    const values = { n: captions.length, candidates: captions.length * numCandidates() };
    byId("several-count").textContent = fault ? "" : t(`several.${state.kind}_count`, values);
    byId("several-fault").textContent = fault;
    byId("several-make").toggleAttribute("disabled", fault !== "");
  };
  const make = () => {
    const found = wanted();
    if (!faultOf(state, found.captions)) submit(found);
  };
  const show = () => {
    const body = byId("several-body");
    const focused = body.contains(document.activeElement) ? document.activeElement?.id : "";
    const tools = { grammar, state, show, showCount };
    body.replaceChildren(
      ...(grammar ? [kindChoice(tools)] : []),
      ...(grammar && state.kind === "grid" ? gridPanel(grammar, tools) : [listPanel(tools)]),
      element("p", { id: "several-count", class: "hint" }),
      element("p", { id: "several-fault", class: "fault", role: "status" }),
      button({ text: t(`several.make_${state.kind}`), class: "secondary", press: make, action: "make-sheet" }),
    );
    /** @type {HTMLElement} */ (body.lastElementChild).id = "several-make";
    showCount();
    if (focused) document.getElementById(focused)?.focus();
  };
  byId("settings").addEventListener("input", showCount);
  captionBox.onChange(showCount);
  onLanguage(show);
  byId("several").hidden = false;
}

/**
 * @param {Grammar|null} grammar
 * @param {State} state
 * @param {string} caption
 * @returns {Wanted}
 */
function wantedOf(grammar, state, caption) {
  if (!grammar || state.kind === "list")
    return { caption: "", axes: [], captions: linesOf(state.lines).map((each) => each.caption) };
  const axes = axesOf(grammar, state);
  return { caption, axes, captions: captionsOf(grammar, caption, axes) };
}

/**
 * @param {Grammar} grammar
 * @param {State} state
 * @returns {Axis[]} the chosen attributes with the values that are not left out
 */
function axesOf(grammar, { chosen, left }) {
  const every = attributesOf(grammar);
  return chosen.flatMap((key) => {
    const found = every.find((each) => keyOf(each) === key);
    return found ? [{ ...found, values: found.values.filter((value) => !left.get(key)?.has(value)) }] : [];
  });
}

/**
 * @param {State} state
 * @param {string[]} captions
 * @returns {string} why nothing can be generated from it; "" when it can
 */
function faultOf(state, captions) {
  const isList = state.kind === "list";
  if (!captions.length) return t(isList ? "several.no_lines" : "several.no_values");
  if (captions.length > MOST_CELLS)
    return t(isList ? "several.too_many_lines" : "several.too_many_cells", { n: captions.length, limit: MOST_CELLS });
  /** @param {string} caption */
  const over = (caption) => [...caption].length - MOST_CHARACTERS;
  const long = captions.find((caption) => over(caption) > 0);
  if (!long) return "";
  const why = t("caption.too_long", { over: over(long), limit: MOST_CHARACTERS });
  const line = linesOf(state.lines).find(({ caption }) => caption === long)?.line;
  return isList && line ? t("several.line_fault", { line, why }) : why;
}

/**
 * @param {Grammar} grammar
 * @returns {Axis[]} every attribute of every subject that has several values
 */
function attributesOf(grammar) {
  return grammar.subjects.flatMap(({ name, fields }) =>
    fields.flatMap(({ attribute, values }) =>
      values.length > 1 ? [{ subject: name, attribute: attribute.name, values }] : [],
    ),
  );
}

/** @param {{subject: string, attribute: string}} axis */
function keyOf({ subject, attribute }) {
  return `${subject}/${attribute}`;
}

/**
 * @param {Grammar} grammar
 * @param {string} caption
 * @returns {string} an attribute that the caption is about, of the most values
 */
function firstAttribute(grammar, caption) {
  const label = labelIn(grammar, caption);
  const every = attributesOf(grammar);
  const stated = every.filter(({ subject }) => subject in label);
  const [first] = (stated.length ? stated : every).sort((one, other) => other.values.length - one.values.length);
  return first ? keyOf(first) : "";
}

// ------------------------------------------------------------------------------------------------------------- parts

/**
 * @param {Tools} tools
 */
function kindChoice({ state, show }) {
  /** @param {"grid"|"list"} kind */
  const option = (kind) => {
    const change = () => {
      state.kind = kind;
      show();
    };
    const id = `several-kind-${kind}`;
    const input = element("input", {
      ...{ type: "radio", name: "several-kind", id, value: kind, checked: state.kind === kind, on: { change } },
    });
    return element("label", { class: "segment" }, input, element("span", { text: t(`several.kind_${kind}`) }));
  };
  const legend = element("legend", { class: "visually-hidden", text: t("several.kind") });
  return element("fieldset", { class: "segments" }, legend, option("grid"), option("list"));
}

/**
 * @param {Grammar} grammar
 * @param {Tools} tools
 * @returns {HTMLElement[]}
 */
function gridPanel(grammar, tools) {
  const axes = [axisField(grammar, tools, 0)];
  if (tools.state.chosen[0]) axes.push(axisField(grammar, tools, 1));
  return [element("p", { class: "hint", text: t("several.grid_hint") }), ...axes.flat()];
}

/**
 * One attribute, and its values as chips that can be left out.
 * @param {Grammar} grammar
 * @param {Tools} tools
 * @param {number} number 0: rows, 1: columns
 * @returns {HTMLElement[]}
 */
function axisField(grammar, { state, show, showCount }, number) {
  const id = `several-axis-${number}`;
  /** @param {string} name */
  const called = (name) => word(grammar, name, language());
  const other = state.chosen[1 - number];
  const groups = grammar.subjects.map(({ name }) => {
    const options = attributesOf(grammar).filter((each) => each.subject === name && keyOf(each) !== other);
    return element(
      "optgroup",
      { label: called(name) },
      ...options.map((each) =>
        element("option", { value: keyOf(each), text: `${called(name)} · ${called(each.attribute)}` }),
      ),
    );
  });
  const none = number ? [element("option", { value: "", text: t("several.none") })] : [];
  const change = () => {
    state.chosen[number] = select.value;
    show();
  };
  const select = element("select", { id, on: { change } }, ...none, ...groups.filter((group) => group.childElementCount));
  select.value = state.chosen[number];
  const label = element("label", { for: id, text: t(number ? "several.columns" : "several.rows") });
  const field = element("div", { class: "field" }, label, select);
  const axis = attributesOf(grammar).find((each) => keyOf(each) === state.chosen[number]);
  return axis ? [field, valuesField(grammar, state, axis, showCount)] : [field];
}

/**
 * @param {Grammar} grammar
 * @param {State} state
 * @param {Axis} axis
 * @param {() => void} changed
 */
function valuesField(grammar, state, axis, changed) {
  const key = keyOf(axis);
  const left = state.left.get(key) ?? new Set();
  state.left.set(key, left);
  const boxes = axis.values.map((value, index) => {
    const change = () => {
      if (input.checked) left.delete(value);
      else left.add(value);
      toggle.textContent = t(left.size ? "several.all" : "several.none_of");
      changed();
    };
    const input = element("input", {
      ...{ type: "checkbox", id: `several-${key}-${index}`, value, checked: !left.has(value), on: { change } },
    });
    return element("label", { class: "chip" }, input, element("span", { text: word(grammar, value, language()) }));
  });
  const toggle = button({
    text: t(left.size ? "several.all" : "several.none_of"),
    press: () => {
      const isAny = left.size > 0;
      left.clear();
      if (!isAny) for (const value of axis.values) left.add(value);
      for (const box of boxes) /** @type {HTMLInputElement} */ (box.firstElementChild).checked = isAny;
      toggle.textContent = t(isAny ? "several.none_of" : "several.all");
      changed();
    },
  });
  return element(
    "fieldset",
    { class: "choice" },
    element("legend", { class: "visually-hidden", text: word(grammar, axis.attribute, language()) }),
    element("div", { class: "options" }, ...boxes, toggle),
  );
}

/**
 * @param {Tools} tools
 */
function listPanel({ state, showCount }) {
  const box = element("textarea", { id: "several-lines", rows: 5, spellcheck: "false", "aria-describedby": "several-fault" });
  box.value = state.lines;
  box.addEventListener("input", () => {
    state.lines = box.value;
    keep(lasting(), LINES, box.value);
    showCount();
  });
  const label = element("label", { for: "several-lines", text: t("several.lines") });
  return element("div", { class: "field" }, label, box);
}
