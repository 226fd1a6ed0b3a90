/**
 * Labels to captions and back, by the grammar that attributes.json holds: the same sentences in the same order as
 * engine/data/kfashion/captions.py makes of the same label, which a test compares.
 *
 * Plain functions of values: no element is touched here.
 */

/**
 * @typedef {{name: string, en: string, particle: string, control: "chips"|"swatches"|"select"|"several"}} Attribute
 * @typedef {{value: string, en: string, swatch?: string}} Value
 * @typedef {{name: string, en: string, attributes: Record<string, string>}} Part attribute -> name of its list of values
 * @typedef {{name: {ko: string, en: string}, sentence: string, join: string, attributes: Attribute[], parts: Part[],
 *   shown_order: string[], examples: {ko: string, en: string, label: Label}[], values: Record<string, Value[]>}} Grammar
 * @typedef {Record<string, Record<string, string|string[]>>} Label part -> attribute -> value, or values
 */

/**
 * @param {Grammar} grammar
 * @param {Label} label
 * @returns {string} one sentence for each attribute that has a value; "" when none has
 */
export function compose(grammar, label) {
  const sentences = [];
  for (const part of grammar.parts) {
    const chosen = label[part.name] ?? {};
    for (const attribute of grammar.attributes) {
      const value = chosen[attribute.name];
      const told = Array.isArray(value) ? value.join(grammar.join) : value;
      if (told) sentences.push(sentence(grammar, part.name, attribute, told));
    }
  }
  return sentences.join(" ");
}

/**
 * What is worth offering to a model: the words that its captions told of, and examples of these.
 * @param {Grammar} grammar
 * @param {Record<string, Record<string, string[]>>} known part to attribute to values, the commonest first
 * @returns {Grammar} the same one where the model does not say, or tells of other things
 */
export function offeredTo(grammar, known) {
  const values = { ...grammar.values };
  const parts = grammar.parts
    .filter((part) => known[part.name])
    .map((part) => {
      const attributes = {};
      for (const [name, list] of Object.entries(part.attributes)) {
        const words = grammar.values[list].filter(({ value }) => known[part.name][name]?.includes(value));
        if (words.length === 0) continue;
        attributes[name] = `${part.name} ${name}`;
        values[attributes[name]] = words;
      }
      return { ...part, attributes };
    });
  if (parts.length === 0) return grammar;
  const shown_order = grammar.shown_order.filter((name) => known[name]);
  const offered = { ...grammar, parts, values, shown_order };
  const examples = shown_order.map((name, number) => example(offered, known, name, number));
  return { ...offered, examples: examples.filter(({ ko }) => ko) };
}

/**
 * A part's commonest category in its `number`-th colour, so that the examples differ, and the commonest of all else that
 * has one value: a small model has seldom read a caption without. Second colours are left out.
 */
function example(grammar, known, name, number) {
  const part = grammar.parts.find((each) => each.name === name);
  const offered = (attribute) => grammar.values[part.attributes[attribute]] ?? [];
  const swatches = grammar.attributes.find(({ control }) => control === "swatches")?.name;
  const colours = offered(swatches).map(({ value }) => value);
  const words = [];
  const label = {};
  for (const { name: attribute, control } of grammar.attributes) {
    const list = offered(attribute);
    const ranked = (known[name][attribute] ?? []).filter((value) => list.some((each) => each.value === value));
    const isSecondColour = attribute !== swatches && colours.includes(ranked[0]);
    if (control === "several" || ranked.length === 0 || isSecondColour) continue;
    const value = ranked[attribute === swatches ? number % ranked.length : 0];
    label[attribute] = value;
    if (control !== "select") words.push(list.find((each) => each.value === value));
  }
  return {
    ko: words.map((word) => word.value).join(" "),
    en: words.map((word) => word.en).join(" "),
    label: { [name]: label },
  };
}

/**
 * @param {Grammar} grammar
 * @param {string} caption
 * @returns {Label|null} the label that composes to exactly this caption; null when none does
 */
export function labelOf(grammar, caption) {
  const text = caption.normalize("NFC").trim().replace(/\s+/gu, " ");
  /** @type {Label} */
  const label = {};
  let rest = text;
  while (rest) {
    const found = firstSentence(grammar, rest);
    if (!found) return null;
    (label[found.part] ??= {})[found.attribute.name] = found.values;
    rest = rest.slice(found.length).trimStart();
  }
  return compose(grammar, label) === text ? label : null;
}

/**
 * @param {Grammar} grammar
 * @param {string} text
 * @returns {{part: string, attribute: Attribute, values: string|string[], length: number}|null}
 */
function firstSentence(grammar, text) {
  for (const part of grammar.parts) {
    for (const attribute of grammar.attributes) {
      const list = part.attributes[attribute.name];
      if (!list) continue;
      const [before, after] = sentence(grammar, part.name, attribute, "\0").split("\0");
      const end = text.indexOf(after, before.length);
      if (!text.startsWith(before) || end < 0) continue;
      const told = text.slice(before.length, end);
      const values = attribute.control === "several" ? told.split(grammar.join) : [told];
      const known = grammar.values[list].map((value) => value.value);
      if (!values.every((value) => known.includes(value))) continue;
      return {
        part: part.name,
        attribute,
        values: attribute.control === "several" ? values : told,
        length: end + after.length,
      };
    }
  }
  return null;
}

/**
 * @param {Grammar} grammar
 * @param {string} part
 * @param {Attribute} attribute
 * @param {string} value
 * @returns {string}
 */
function sentence(grammar, part, attribute, value) {
  const words = { part, attribute: attribute.name, particle: attribute.particle, value };
  return grammar.sentence.replace(/\{(\w+)\}/gu, (_, name) => words[name]);
}
