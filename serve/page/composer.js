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
 *
 * @typedef {{subject: string, attribute: string, value: string|string[], length: number}} Fact `length`: of its sentence
 * @typedef {{text: string, fact: Fact|null}} Part of a caption: a sentence of the form, or one's own words
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
  const label = labelIn(grammar, caption);
  return compose(grammar, label) === oneLine(caption) ? label : null;
}

/**
 * @param {Grammar} grammar
 * @param {string} caption
 * @returns {Label} what its sentences of the form state, whatever else it says
 */
export function labelIn(grammar, caption) {
  /** @type {Label} */
  const label = {};
  for (const { fact } of partsOf(grammar, caption)) if (fact) (label[fact.subject] ??= {})[fact.attribute] = fact.value;
  return label;
}

/**
 * @param {Grammar} grammar
 * @param {string} caption
 * @returns {Part[]} its sentences of the form, and one's own words between them
 */
export function partsOf(grammar, caption) {
  /** @type {Part[]} */
  const parts = [];
  let rest = oneLine(caption);
  while (rest) {
    const fact = firstSentence(grammar, rest);
    const length = fact ? fact.length : (/^\S+/u.exec(rest)?.[0].length ?? rest.length);
    const text = rest.slice(0, length);
    const last = parts.at(-1);
    if (fact || !last || last.fact) parts.push({ text, fact });
    else last.text += ` ${text}`;
    rest = rest.slice(length).trimStart();
  }
  return parts;
}

/**
 * @param {Grammar} grammar
 * @param {string} caption
 * @param {{subject: string, attribute: string, value: string|string[]}} stated "" or [] takes the sentence away
 * @returns {string} the caption with this sentence in the place of the one on the same attribute, or at its place in the
 *   form's order; one's own words stay
 */
export function withValue(grammar, caption, { subject, attribute, value }) {
  const { form } = grammar;
  const text = Array.isArray(value) ? value.join(form.separator) : value;
  const of = form.attributes.find((each) => each.name === attribute);
  const fact = text && of ? { subject, attribute, value, length: 0 } : null;
  const written = fact && of ? [{ text: sentence(of, subject, text), fact }] : [];
  const parts = partsOf(grammar, caption);
  /** @param {Part} part */
  const isSame = (part) => part.fact?.subject === subject && part.fact.attribute === attribute;
  /** @param {{subject: string, attribute: string}} each */
  const place = (each) =>
    form.subjects.indexOf(each.subject) * form.attributes.length +
    form.attributes.findIndex(({ name }) => name === each.attribute);
  const before = parts.findLastIndex((part) => part.fact && place(part.fact) < place({ subject, attribute }));
  const after = parts.findIndex((part) => part.fact && place(part.fact) > place({ subject, attribute }));
  const old = parts.findIndex(isSame);
  const at = old >= 0 ? old : before >= 0 ? before + 1 : after >= 0 ? after : parts.length;
  const others = [...parts.slice(0, at), ...written, ...parts.slice(at).filter((part) => !isSame(part))];
  return others.map((part) => part.text).join(" ");
}

/**
 * @param {Grammar} grammar
 * @param {string} caption
 * @returns {string} one's own words alone
 */
export function ownWords(grammar, caption) {
  return partsOf(grammar, caption)
    .filter(({ fact }) => !fact)
    .map(({ text }) => text)
    .join(" ");
}

/**
 * @param {Grammar} grammar
 * @param {string} value
 * @param {string[]} preferred subjects, the likeliest first
 * @returns {{subject: string, attribute: string, isList: boolean}|null} what the value would be said of; null: of nothing
 */
export function placeOf(grammar, value, preferred = []) {
  /** @param {Subject} subject */
  const rank = ({ name }) => (preferred.includes(name) ? preferred.indexOf(name) : preferred.length);
  for (const subject of [...grammar.subjects].sort((one, other) => rank(one) - rank(other))) {
    const field = subject.fields.find(({ values }) => values.includes(value));
    if (field) {
      const isList = field.attribute.control === "several";
      return { subject: subject.name, attribute: field.attribute.name, isList };
    }
  }
  return null;
}

/**
 * @param {Grammar} grammar
 * @param {string} caption
 * @param {string[]} values of the model, that one's own words meant
 * @param {string} current the subject to take where several would do
 * @returns {string} the caption's sentences of the form and new ones on these values, without one's own words
 */
export function captionOf(grammar, caption, values, current) {
  const stated = compose(grammar, labelIn(grammar, caption));
  const words = oneLine(caption).toLocaleLowerCase();
  /** @param {Subject} subject */
  const knows = (subject) =>
    values.filter((value) => subject.fields.some((field) => field.values.includes(value))).length +
    // A subject that the words name, in any language, is meant.
    Number([subject.name, ...namesOf(grammar, subject.name)].some((name) => words.includes(name.toLocaleLowerCase())));
  const ordered = [...grammar.subjects].sort(
    (one, other) => knows(other) - knows(one) || Number(other.name === current) - Number(one.name === current),
  );
  const preferred = ordered.map(({ name }) => name);
  return values.reduce((text, value) => {
    const place = placeOf(grammar, value, preferred);
    if (!place) return text;
    const before = labelIn(grammar, text)[place.subject]?.[place.attribute] ?? [];
    return withValue(grammar, text, { ...place, value: place.isList ? [...new Set([before, value].flat())] : value });
  }, stated);
}

/**
 * @param {Grammar|null} grammar
 * @param {string} caption
 * @param {string} language
 * @returns {string} what it says, in the words of that language: `Top: Colour Sky blue, Category Shirt`; one's own words as
 *   they are; "" where the caption says the same already
 */
export function reading(grammar, caption, language) {
  if (!grammar?.form.words[language]) return "";
  const parts = partsOf(grammar, caption);
  if (!parts.some(({ fact }) => fact)) return "";
  /** @param {string} name */
  const called = (name) => word(grammar, name, language);
  /** @type {string[]} */
  const read = [];
  let subject = "";
  for (const { text, fact } of parts) {
    const value = fact && [fact.value].flat().map(called).join(", ");
    const said = fact ? `${called(fact.attribute)} ${value}` : text;
    if (fact && fact.subject === subject) read[read.length - 1] += ` · ${said}`;
    else read.push(fact ? `${called(fact.subject)}: ${said}` : said);
    subject = fact?.subject ?? "";
  }
  return read.join("; ");
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
 * @param {string} name
 * @returns {string[]} what it is called in all languages of the form
 */
function namesOf({ form }, name) {
  return Object.values(form.words).flatMap((words) => words[name] ?? []);
}

/** @param {string} caption */
function oneLine(caption) {
  return caption.normalize("NFC").trim().replace(/\s+/gu, " ");
}

/**
 * @param {Grammar} grammar
 * @param {string} text
 * @returns {Fact|null} of the sentence that the text begins with
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
