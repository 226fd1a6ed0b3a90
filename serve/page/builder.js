/**
 * The caption's sentences as a form of attributes: it reads them from the caption box, and writes what is chosen there.
 *
 * Subjects, attributes, values and sentences are the served model's. One's own words between them stay as they are.
 */

import { labelIn, ownWords, withValue, word } from "./composer.js";
import { button, byId, element } from "./elements.js";
import { keep, kept, lasting } from "./preferences.js";
import { language, onLanguage, t } from "./texts.js";

const SUBJECT = "kodalle.subject";

/**
 * @typedef {import("./composer.js").Grammar} Grammar
 * @typedef {import("./composer.js").FormAttribute} FormAttribute
 * @typedef {string|string[]} Value
 * @typedef {(attribute: FormAttribute, values: string[], chosen: Value, put: (value: Value) => void, called: Called) =>
 *   HTMLElement} Control
 * @typedef {(name: string) => string} Called the word for a name in the language shown
 * @typedef {{label: import("./composer.js").Label, subject: string, isWriting: boolean}} State
 */

/**
 * Shows the form; until then the page has none.
 * @param {Grammar} grammar
 * @param {import("./caption.js").CaptionBox} captionBox
 */
export function startBuilder(grammar, captionBox) {
  const names = grammar.subjects.map(({ name }) => name);
  const before = kept(lasting(), SUBJECT);
  /** @type {State} */
  const state = { label: {}, subject: names.includes(before) ? before : names[0], isWriting: false };

  /** @param {string} caption */
  const write = (caption) => {
    state.isWriting = true;
    captionBox.write(caption);
    state.isWriting = false;
    state.label = labelIn(grammar, caption);
    showCounts(state);
  };
  /**
   * @param {string} attribute
   * @param {Value} value
   */
  const put = (attribute, value) =>
    write(withValue(grammar, captionBox.read(), { subject: state.subject, attribute, value }));
  const clear = () => {
    write(ownWords(grammar, captionBox.read()));
    show();
  };
  const show = () => {
    byId("builder-title").textContent = grammar.form.title[language()] ?? Object.values(grammar.form.title)[0] ?? "";
    const body = byId("builder-body");
    const focused = body.contains(document.activeElement) ? /** @type {HTMLElement} */ (document.activeElement) : null;
    body.replaceChildren(
      subjectChoice(grammar, state, show),
      fieldsOf(grammar, state, put),
      button({ text: t("builder.clear"), press: clear, action: "clear-builder" }),
    );
    showCounts(state);
    // What is made anew keeps the keyboard where it was.
    if (focused?.id) document.getElementById(focused.id)?.focus();
    else if (focused?.dataset.action)
      /** @type {HTMLElement|null} */ (body.querySelector(`[data-action="${focused.dataset.action}"]`))?.focus();
  };
  /** @param {string} caption */
  const readBack = (caption) => {
    const label = labelIn(grammar, caption);
    if (JSON.stringify(label) === JSON.stringify(state.label)) return;
    state.label = label;
    const stated = names.filter((name) => name in label);
    state.subject = stated.find((name) => name === state.subject) ?? stated[0] ?? state.subject;
    show();
  };

  captionBox.onChange((caption) => {
    if (!state.isWriting) readBack(caption);
  });
  const fold = byId("builder");
  // On a phone it would push everything else out of sight.
  const wish =
    kept(lasting(), "kodalle.builder") || (window.matchMedia("(max-width: 640px)").matches ? "closed" : "open");
  fold.toggleAttribute("open", wish === "open");
  fold.addEventListener("toggle", () =>
    keep(lasting(), "kodalle.builder", fold.hasAttribute("open") ? "open" : "closed"),
  );
  readBack(captionBox.read());
  onLanguage(show);
  fold.hidden = false;
}

/**
 * @param {Grammar} grammar
 * @param {State} state
 * @param {() => void} show
 * @returns {HTMLElement}
 */
function subjectChoice(grammar, state, show) {
  const choices = grammar.subjects.map(({ name }) => {
    const input = element("input", {
      type: "radio",
      name: "subject",
      value: name,
      checked: state.subject === name,
      on: {
        change: () => {
          state.subject = name;
          keep(lasting(), SUBJECT, name);
          show();
          /** @type {HTMLElement|null} */ (
            document.querySelector(`input[name="subject"][value="${CSS.escape(name)}"]`)
          )?.focus();
        },
      },
    });
    return element(
      "label",
      { class: "segment" },
      input,
      element("span", { text: word(grammar, name, language()) }),
      element("span", { class: "dot", "data-subject": name }),
    );
  });
  return element(
    "fieldset",
    { class: "segments" },
    element("legend", { class: "visually-hidden", text: t("builder.subject") }),
    ...choices,
  );
}

/**
 * A number on every subject that the caption has sentences on: those not shown would be forgotten otherwise.
 * @param {State} state
 */
function showCounts(state) {
  for (const dot of document.querySelectorAll("[data-subject]")) {
    const chosen = state.label[dot.getAttribute("data-subject") ?? ""] ?? {};
    const number = Object.values(chosen).filter((value) => value.length).length;
    dot.textContent = number ? String(number) : "";
  }
}

/**
 * @param {Grammar} grammar
 * @param {State} state
 * @param {(attribute: string, value: Value) => void} put
 * @returns {HTMLElement}
 */
function fieldsOf(grammar, state, put) {
  const subject = grammar.subjects.find((each) => each.name === state.subject) ?? grammar.subjects[0];
  /** @type {Record<FormAttribute["control"], Control>} */
  const controls = {
    chips: choiceField,
    swatches: (...given) => choiceField(...given, grammar.form.colours),
    select: selectField,
    several: severalField,
  };
  /** @type {Called} */
  const called = (name) => word(grammar, name, language());
  const fields = subject.fields.map(({ attribute, values }) => {
    const { name } = attribute;
    const chosen = state.label[subject.name]?.[name] ?? "";
    return controls[attribute.control](attribute, values, chosen, (value) => put(name, value), called);
  });
  return element("div", { class: "attributes" }, ...fields);
}

/**
 * One of few values, all in sight: as words, or as swatches where `colours` are given.
 * @type {(...given: [...Parameters<Control>, colours?: Record<string, string>]) => HTMLElement}
 */
function choiceField(attribute, values, chosen, put, called, colours) {
  /** @param {Value} value */
  const shownWord = (value) => (colours && typeof value === "string" && value ? called(value) : "");
  const current = element("span", { class: "current", text: shownWord(chosen) });
  /**
   * @param {string} value
   * @param {string} text
   */
  const option = (value, text) => {
    const input = element("input", {
      type: "radio",
      name: `choice-${attribute.name}`,
      value,
      checked: value === chosen,
      on: {
        change: () => {
          current.textContent = shownWord(value);
          put(value);
        },
      },
    });
    if (!colours) return element("label", { class: "chip" }, input, element("span", { text }));
    const colour = colours[value];
    return element(
      "label",
      { class: "swatch-choice", title: text },
      input,
      element("span", { class: colour ? "swatch" : "swatch none", style: colour ? { "--swatch": colour } : {} }),
      element("span", { class: "visually-hidden", text }),
    );
  };
  return element(
    "fieldset",
    { class: `choice wide ${attribute.control}` },
    element("legend", {}, called(attribute.name), " ", colours ? current : null),
    element(
      "div",
      { class: "options" },
      option("", t("builder.any")),
      ...values.map((value) => option(value, called(value))),
    ),
  );
}

/**
 * One of many values.
 * @type {Control}
 */
function selectField(attribute, values, chosen, put, called) {
  const id = `choice-${attribute.name}`;
  const select = element(
    "select",
    { id, on: { change: () => put(select.value) } },
    ...optionsOf(values, t("builder.any"), called),
  );
  select.value = String(chosen);
  return element("div", { class: "field" }, element("label", { for: id, text: called(attribute.name) }), select);
}

/**
 * Any number of many values: chosen ones become buttons that take them away again.
 * @type {Control}
 */
function severalField(attribute, values, chosen, put, called) {
  const id = `choice-${attribute.name}`;
  let current = chosen ? [...chosen] : [];
  const chips = element("div", { class: "options" });
  const add = () => {
    if (select.value && !current.includes(select.value)) current = [...current, select.value];
    select.value = "";
    show();
    put(current);
  };
  const select = element("select", { id, on: { change: add } }, ...optionsOf(values, t("builder.add"), called));
  /** @param {string} value */
  const remove = (value) => {
    current = current.filter((other) => other !== value);
    show();
    put(current);
    select.focus();
  };
  const show = () => {
    chips.replaceChildren(
      ...current.map((value) => {
        const text = called(value);
        const chip = button({ icon: "close", text, class: "chip chosen", press: () => remove(value) });
        chip.setAttribute("aria-label", t("builder.remove", { value: text }));
        return chip;
      }),
    );
  };
  show();
  return element(
    "div",
    { class: "field several" },
    element("label", { for: id, text: called(attribute.name) }),
    select,
    chips,
  );
}

/**
 * @param {string[]} values
 * @param {string} first the text of the option that chooses none
 * @param {Called} called
 * @returns {HTMLElement[]}
 */
function optionsOf(values, first, called) {
  return [
    element("option", { value: "", text: first }),
    ...values.map((value) => element("option", { value, text: called(value) })),
  ];
}
