/**
 * Composes a caption from attributes, and reads one back into them, so that builder and caption box say the same.
 *
 * What parts, attributes and values there are is data (attributes.json): for other pictures than clothes another file
 * goes there. A caption in one's own words is never overwritten: the composed one is offered beneath instead.
 */

import { compose, labelOf } from "./composer.js";
import { button, byId, element } from "./elements.js";
import { keep, kept, lasting } from "./preferences.js";
import { language, onLanguage, t } from "./texts.js";

/** @typedef {import("./composer.js").Grammar} Grammar */

/**
 * @returns {Promise<Grammar>}
 */
export async function readGrammar() {
  return (await fetch(new URL("attributes.json", import.meta.url))).json();
}

/**
 * @param {Grammar} grammar
 * @param {import("./caption.js").CaptionBox} captionBox
 * @returns {{offer: (grammar: Grammar) => void}} `offer`: choices from now on are those of this grammar, a part of the
 *   other one; captions are read by the whole
 */
export function startBuilder(grammar, captionBox) {
  let offered = grammar;
  const state = { label: labelOf(grammar, captionBox.read()) ?? {}, part: grammar.shown_order[0], isWriting: false };

  const offerOrWrite = () => {
    const composed = compose(grammar, state.label);
    const isOurs = captionBox.read() === "" || labelOf(grammar, captionBox.read()) !== null;
    if (isOurs) {
      state.isWriting = true;
      captionBox.write(composed);
      state.isWriting = false;
    }
    showOffer(isOurs ? "" : composed, () => captionBox.write(composed));
    showCounts(grammar, state);
  };
  const draw = () => {
    byId("builder-title").textContent = grammar.name[language()];
    const body = byId("builder-body");
    body.replaceChildren(
      partChoice(offered, state, draw),
      fieldsOf(offered, state, offerOrWrite),
      element("div", { id: "builder-offer", class: "offer", hidden: true }),
      button({ text: t("builder.clear"), press: () => ((state.label = {}), offerOrWrite(), draw()) }),
    );
    showCounts(grammar, state);
  };

  captionBox.onChange((caption) => {
    if (state.isWriting) return;
    showOffer("", () => {});
    const label = labelOf(grammar, caption);
    if (label === null) return;
    state.label = label;
    const told = Object.keys(label).filter((part) => offered.shown_order.includes(part));
    state.part = told.find((part) => part === state.part) ?? told[0] ?? state.part;
    draw();
  });
  const fold = byId("builder");
  // On a phone it would push everything else out of sight.
  const wish =
    kept(lasting(), "kodalle.builder") || (window.matchMedia("(max-width: 640px)").matches ? "closed" : "open");
  fold.toggleAttribute("open", wish === "open");
  fold.addEventListener("toggle", () =>
    keep(lasting(), "kodalle.builder", fold.hasAttribute("open") ? "open" : "closed"),
  );
  onLanguage(draw);
  return {
    offer: (grammar) => {
      offered = grammar;
      if (!offered.shown_order.includes(state.part)) state.part = offered.shown_order[0];
      draw();
    },
  };
}

/**
 * @param {Grammar} grammar
 * @param {{part: string, label: import("./composer.js").Label}} state
 * @param {() => void} draw
 * @returns {HTMLElement}
 */
function partChoice(grammar, state, draw) {
  const choices = grammar.shown_order.map((name) => {
    const part = grammar.parts.find((each) => each.name === name);
    const input = element("input", {
      type: "radio",
      name: "part",
      value: name,
      checked: state.part === name,
      on: {
        change: () => {
          state.part = name;
          draw();
          /** @type {HTMLElement|null} */ (
            document.querySelector(`input[name="part"][value="${CSS.escape(name)}"]`)
          )?.focus();
        },
      },
    });
    return element(
      "label",
      { class: "segment" },
      input,
      element("span", { text: word(part) }),
      element("span", { class: "dot", "data-part": name }),
    );
  });
  return element(
    "fieldset",
    { class: "segments" },
    element("legend", { class: "visually-hidden", text: t("builder.part") }),
    ...choices,
  );
}

/** A dot on every part that the caption tells of: those not shown would be forgotten otherwise. */
function showCounts(grammar, state) {
  for (const dot of document.querySelectorAll("[data-part]")) {
    const chosen = state.label[dot.getAttribute("data-part")] ?? {};
    const number = Object.values(chosen).filter((value) => value.length).length;
    dot.textContent = number ? String(number) : "";
  }
}

/**
 * @param {Grammar} grammar
 * @param {{part: string, label: import("./composer.js").Label}} state
 * @param {() => void} changed
 * @returns {HTMLElement}
 */
function fieldsOf(grammar, state, changed) {
  const part = grammar.parts.find((each) => each.name === state.part);
  const controls = { chips: choiceField, swatches: choiceField, select: selectField, several: severalField };
  const fields = Object.entries(part.attributes).map(([name, list]) => {
    const attribute = grammar.attributes.find((each) => each.name === name);
    const put = (value) => {
      const chosen = (state.label[part.name] ??= {});
      if (value.length) chosen[name] = value;
      else delete chosen[name];
      changed();
    };
    return controls[attribute.control](attribute, grammar.values[list], state.label[part.name]?.[name] ?? "", put);
  });
  return element("div", { class: "attributes" }, ...fields);
}

/** One of few values, all in sight: the category as words, a colour as cloth. */
function choiceField(attribute, values, chosen, put) {
  const isSwatch = attribute.control === "swatches";
  const told = element("span", { class: "told", text: wordOf(values, chosen) });
  const option = (value, text, swatch) => {
    const input = element("input", {
      type: "radio",
      name: `choice-${attribute.name}`,
      value,
      checked: value === chosen,
      on: {
        change: () => {
          told.textContent = isSwatch ? wordOf(values, value) : "";
          put(value);
        },
      },
    });
    const shown = isSwatch
      ? element("span", { class: swatch ? "swatch" : "swatch none", style: swatch ? { "--cloth": swatch } : {} })
      : element("span", { text });
    const name = isSwatch ? element("span", { class: "visually-hidden", text }) : null;
    return element(
      "label",
      { class: isSwatch ? "swatch-choice" : "chip", title: isSwatch ? text : null },
      input,
      shown,
      name,
    );
  };
  return element(
    "fieldset",
    { class: `choice wide ${attribute.control}` },
    element("legend", {}, word(attribute), " ", isSwatch ? told : null),
    element(
      "div",
      { class: "options" },
      option("", t("builder.any"), null),
      ...values.map((value) => option(value.value, word(value), value.swatch)),
    ),
  );
}

/** One of many values. */
function selectField(attribute, values, chosen, put) {
  const id = `choice-${attribute.name}`;
  const select = element(
    "select",
    { id, on: { change: (event) => put(event.target.value) } },
    ...optionsOf(values, t("builder.any")),
  );
  select.value = chosen;
  return element("div", { class: "field" }, element("label", { for: id, text: word(attribute) }), select);
}

/** Any number of many values: chosen ones become buttons that take them away again. */
function severalField(attribute, values, chosen, put) {
  const id = `choice-${attribute.name}`;
  let told = chosen ? [...chosen] : [];
  const chips = element("div", { class: "options" });
  const select = element(
    "select",
    {
      id,
      on: {
        change: () => {
          if (select.value && !told.includes(select.value)) told = [...told, select.value];
          select.value = "";
          show();
          put(told);
        },
      },
    },
    ...optionsOf(values, t("builder.add")),
  );
  const remove = (value) => {
    told = told.filter((other) => other !== value);
    show();
    put(told);
    select.focus();
  };
  const show = () => {
    chips.replaceChildren(
      ...told.map((value) => {
        const text = wordOf(values, value);
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
    element("label", { for: id, text: word(attribute) }),
    select,
    chips,
  );
}

/** @returns {HTMLElement[]} */
function optionsOf(values, first) {
  return [
    element("option", { value: "", text: first }),
    ...values.map((value) => element("option", { value: value.value, text: word(value) })),
  ];
}

/**
 * @param {string} composed "" takes the offer back
 * @param {() => void} accept
 */
function showOffer(composed, accept) {
  const place = byId("builder-offer");
  place.hidden = composed === "";
  if (place.hidden) return;
  place.replaceChildren(
    element("p", { class: "hint", text: t("builder.own_words") }),
    element("p", { class: "composed", text: composed, lang: "ko" }),
    button({ text: t("builder.replace"), class: "secondary", press: accept }),
  );
}

/**
 * @param {{name?: string, value?: string, en: string}} named
 * @returns {string} in the language shown
 */
function word(named) {
  return language() === "en" ? named.en : (named.name ?? named.value);
}

/** @returns {string} the word of a value in the language shown; "" for none */
function wordOf(values, value) {
  const found = values.find((each) => each.value === value);
  return found ? word(found) : "";
}
