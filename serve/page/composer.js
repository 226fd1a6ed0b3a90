/**
 * Attributes to captions and back, by the form that the served model sends (engine/data/caption_guide.py).
 *
 * Plain functions of values: no element is touched here.
 */

/**
 * As in the API: how to write captions for a model.
 * @typedef {object} CaptionGuide
 * @property {string[]} examples
 * @property {Record<string, Record<string, string[]>>} attributes subject to attribute to values, the commonest first
 * @property {CaptionForm|null} form null: captions are free text
 *
 * @typedef {object} CaptionForm
 * @property {Record<string, string>} title by language
 * @property {string[]} subjects in the order of a caption's sentences
 * @property {FormAttribute[]} attributes in the order of a subject's sentences
 * @property {string} separator between several values
 * @property {string[]} shown_subjects in the order of the form; empty: as in captions
 * @property {string[]} shown_attributes in the order of the form; empty: as in captions
 * @property {Record<string, Record<string, string>>} words by language
 * @property {Record<string, string>} colours of values that are colours
 *
 * @typedef {{name: string, sentence: string, control: "chips"|"swatches"|"select"|"several"}} FormAttribute
 */

/**
 * A form with the values that the model knows.
 * @typedef {object} Grammar
 * @property {CaptionForm} form
 * @property {Subject[]} subjects in the order of the form
 *
 * @typedef {{name: string, fields: Field[]}} Subject
 * @typedef {{attribute: FormAttribute, values: string[]}} Field
 *
 * @typedef {Record<string, Record<string, string|string[]>>} Label subject to attribute to value, or values
 */

/**
 * @param {CaptionGuide} guide
 * @returns {Grammar|null} null where captions are not composed from attributes
 */
export function grammarOf({ attributes, form }) {
  if (!form) return null;
  const order = Object.keys(Object.values(form.words)[0] ?? {});
  /** @param {string} value */
  const place = (value) => (order.includes(value) ? order.indexOf(value) : order.length);
  const attributeNames = form.shown_attributes.length ? form.shown_attributes : form.attributes.map(({ name }) => name);
  const subjectNames = form.shown_subjects.length ? form.shown_subjects : form.subjects;
  const subjects = subjectNames.map((name) => ({
    name,
    fields: attributeNames.flatMap((attributeName) => {
      const attribute = form.attributes.find((each) => each.name === attributeName);
      const values = attributes[name]?.[attributeName] ?? [];
      return attribute && values.length
        ? [{ attribute, values: [...values].sort((one, other) => place(one) - place(other)) }]
        : [];
    }),
  }));
  const known = subjects.filter(({ fields }) => fields.length);
  return known.length ? { form, subjects: known } : null;
}

/**
 * @param {Grammar} grammar
 * @param {Label} label
 * @returns {string} one sentence for each attribute that has a value; "" when none has
 */
export function compose({ form }, label) {
  const sentences = [];
  for (const subject of form.subjects) {
    for (const attribute of form.attributes) {
      const value = label[subject]?.[attribute.name];
      const text = Array.isArray(value) ? value.join(form.separator) : value;
      if (text) sentences.push(sentence(attribute, subject, text));
    }
  }
  return sentences.join(" ");
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
    (label[found.subject] ??= {})[found.attribute] = found.value;
    rest = rest.slice(found.length).trimStart();
  }
  return compose(grammar, label) === text ? label : null;
}

/**
 * @param {Grammar|null} grammar
 * @param {string} caption
 * @param {string} language
 * @returns {string} the values in a composed caption, other captions as they are
 */
export function shortTitle(grammar, caption, language) {
  const label = grammar && labelOf(grammar, caption);
  if (!label) return caption;
  const { attributes, subjects } = grammar.form;
  const values = subjects.flatMap((subject) => attributes.flatMap(({ name }) => label[subject]?.[name] ?? []));
  const words = values.map((value) => word(grammar, value, language));
  return words.map((each, index) => (index ? each.toLowerCase() : each)).join(" ");
}

/**
 * @param {Grammar} grammar
 * @param {string} name of a subject, an attribute or a value
 * @param {string} language
 * @returns {string} what it is called in that language; the name itself where the form has no other word
 */
export function word({ form }, name, language) {
  return form.words[language]?.[name] ?? name;
}

/**
 * @param {Grammar} grammar
 * @param {string} text
 * @returns {{subject: string, attribute: string, value: string|string[], length: number}|null}
 */
function firstSentence(grammar, text) {
  for (const subject of grammar.subjects) {
    for (const { attribute, values } of subject.fields) {
      const [before, after] = sentence(attribute, subject.name, "\0").split("\0");
      const end = text.indexOf(after, before.length);
      if (!text.startsWith(before) || end < 0) continue;
      const stated = text.slice(before.length, end);
      const isSeveral = attribute.control === "several";
      const found = isSeveral ? stated.split(grammar.form.separator) : [stated];
      if (!found.every((value) => values.includes(value))) continue;
      return {
        subject: subject.name,
        attribute: attribute.name,
        value: isSeveral ? found : stated,
        length: end + after.length,
      };
    }
  }
  return null;
}

/**
 * @param {FormAttribute} attribute
 * @param {string} subject
 * @param {string} value
 * @returns {string}
 */
function sentence(attribute, subject, value) {
  const words = { subject, value };
  return attribute.sentence.replace(/\{(subject|value)\}/gu, (_, name) => words[/** @type {keyof words} */ (name)]);
}
