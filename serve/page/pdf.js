/**
 * PDF files of pages that are images, with their text beneath to be searched and copied.
 *
 * A browser has fonts with Korean letters and no way to read their files, so a page's text is painted by the browser, as an
 * image; the same text lies over it in fonts that paint nothing and name every letter (a Type 3 font with a ToUnicode table).
 *
 * Source: ISO 32000-1 (PDF 1.7): 7.5 file structure, 8.9 images, 9.6.5 Type 3 fonts, 9.10.3 ToUnicode, 7.11.4 embedded files,
 * 14.3.2 metadata. Lengths are in points, from a page's lower left corner.
 */

/**
 * @typedef {{x: number, y: number, width: number, height: number}} Box
 * @typedef {{text: string, x: number, y: number, size: number, width: number}} Line `y` of its baseline; `width` as painted
 *
 * @typedef {object} Pdf
 * @property {(canvas: HTMLCanvasElement, options: {isGrey?: boolean, xmp?: string}) => Promise<string>} addImage returns what
 *   `addPage` calls it
 * @property {(width: number, height: number, images: {image: string, box: Box}[], lines: Line[]) => Promise<void>} addPage
 * @property {(options: {title: string, language: string, xmp: string, attachments: {name: string, content: string}[]}) =>
 *   Promise<Blob>} finish
 */

/** @returns {Pdf} */
export function createPdf() {
  /** @type {BlobPart[]} */
  const parts = [];
  /** @type {number[]} bytes before each object, by its number less one */
  const offsets = [];
  let length = 0;
  /** @param {Uint8Array<ArrayBuffer>|string} part */
  const write = (part) => {
    const bytes = typeof part === "string" ? new TextEncoder().encode(part) : part;
    parts.push(bytes);
    length += bytes.length;
  };
  // A comment of bytes above 127 says that the file is binary.
  write("%PDF-1.7\n");
  write(Uint8Array.of(0x25, 0xe2, 0xe3, 0xcf, 0xd3, 0x0a));

  const reserve = () => offsets.push(-1);
  /**
   * @param {string} dictionary what stands between << and >>
   * @param {Uint8Array<ArrayBuffer>|null} [stream]
   * @param {number} [number] reserved before
   * @returns {string} a reference
   */
  const add = (dictionary, stream = null, number = reserve()) => {
    offsets[number - 1] = length;
    const ends = stream ? ` /Length ${stream.length}` : "";
    write(`${number} 0 obj\n<< ${dictionary}${ends} >>\n`);
    if (stream) {
      write("stream\n");
      write(stream);
      write("\nendstream\n");
    }
    write("endobj\n");
    return `${number} 0 R`;
  };
  /**
   * @param {string} dictionary
   * @param {Uint8Array<ArrayBuffer>|string} content
   */
  const addDeflated = async (dictionary, content) => {
    const stream = await deflated(typeof content === "string" ? new TextEncoder().encode(content) : content);
    return add(`${dictionary} /Filter /FlateDecode`, stream);
  };
  /** @param {string} xmp stays readable: asset managers look for it in the file's bytes */
  const addXmp = (xmp) => add("/Type /Metadata /Subtype /XML", new TextEncoder().encode(xmp));

  const tree = reserve();
  /** @type {string[]} */
  const pages = [];
  const letters = createLetters();

  return {
    addImage: async (canvas, { isGrey = false, xmp = "" }) => {
      const { width, height } = canvas;
      const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
      const pixels = samplesOf(context.getImageData(0, 0, width, height).data, isGrey ? 1 : 3);
      const metadata = xmp ? ` /Metadata ${addXmp(xmp)}` : "";
      const space = isGrey ? "/DeviceGray" : "/DeviceRGB";
      const size = `/Width ${width} /Height ${height} /ColorSpace ${space} /BitsPerComponent 8`;
      return addDeflated(`/Type /XObject /Subtype /Image ${size}${metadata}`, pixels);
    },
    addPage: async (width, height, images, lines) => {
      const painted = images.map(
        ({ box }, index) => `q ${fixed(box.width)} 0 0 ${fixed(box.height)} ${fixed(box.x)} ${fixed(box.y)} cm /I${index} Do Q`,
      );
      const contents = await addDeflated("", [...painted, ...lines.flatMap(letters.show)].join("\n"));
      const names = images.map(({ image }, index) => `/I${index} ${image}`).join(" ");
      const fonts = letters.number();
      const resources = `/XObject << ${names} >> /Font ${fonts} 0 R`;
      pages.push(
        add(
          `/Type /Page /Parent ${tree} 0 R /MediaBox [0 0 ${fixed(width)} ${fixed(height)}] ` +
            `/Contents ${contents} /Resources << ${resources} >>`,
        ),
      );
    },
    finish: async ({ title, language, xmp, attachments }) => {
      const fonts = [];
      // With a box, though nothing is in it: PDFium, which is in Chrome, finds no letter without one.
      for (const { name, table, count } of letters.fonts()) {
        const nothing = add("", new TextEncoder().encode("1000 0 0 0 1000 1000 d1"));
        const unicode = await addDeflated("", table);
        const shape = "/FontBBox [0 0 1000 1000] /FontMatrix [0.001 0 0 0.001 0 0]";
        const encoding = `/Type /Encoding /Differences [0 ${"/letter ".repeat(count)}]`;
        const widths = `/FirstChar 0 /LastChar ${count - 1} /Widths [${"1000 ".repeat(count)}]`;
        const font = add(
          `/Type /Font /Subtype /Type3 ${shape} /CharProcs << /letter ${nothing} >> /Encoding << ${encoding} >> ` +
            `${widths} /Resources << >> /ToUnicode ${unicode}`,
        );
        fonts.push(`/${name} ${font}`);
      }
      add(fonts.join(" "), null, letters.number());
      add(`/Type /Pages /Kids [${pages.join(" ")}] /Count ${pages.length}`, null, tree);
      const files = [];
      for (const { name, content } of attachments) {
        const file = await addDeflated("/Type /EmbeddedFile /Subtype /application#2Fjson", content);
        files.push(`${text(name)} ${add(`/Type /Filespec /F ${text(name)} /UF ${text(name)} /EF << /F ${file} >>`)}`);
      }
      const names = files.length ? ` /Names << /EmbeddedFiles << /Names [${files.join(" ")}] >> >>` : "";
      const metadata = xmp ? ` /Metadata ${addXmp(xmp)}` : "";
      const shown = `/Lang ${text(language)} /ViewerPreferences << /DisplayDocTitle true >>`;
      const root = add(`/Type /Catalog /Pages ${tree} 0 R ${shown}${names}${metadata}`);
      const info = add(`/Title ${text(title)} /Creator (KoDALLE)`);
      const start = length;
      const entries = offsets.map((offset) => `${String(offset).padStart(10, "0")} 00000 n \n`);
      write(`xref\n0 ${offsets.length + 1}\n0000000000 65535 f \n${entries.join("")}`);
      write(`trailer\n<< /Size ${offsets.length + 1} /Root ${root} /Info ${info} >>\nstartxref\n${start}\n%%EOF\n`);
      return new Blob(parts, { type: "application/pdf" });
    },
  };

  /** Codes for letters, in as many fonts of 256 as there are letters. */
  function createLetters() {
    /** @type {Map<string, number>} */
    const places = new Map();
    const dictionary = reserve();
    /** @param {string} letter */
    const placeOf = (letter) => {
      const place = places.get(letter) ?? places.size;
      places.set(letter, place);
      return place;
    };
    return {
      number: () => dictionary,
      /**
       * @param {Line} line
       * @returns {string[]} operators that show it without painting
       */
      show: ({ text: shown, x, y, size, width }) => {
        const letters = [...shown];
        if (!letters.length) return [];
        // Every letter is as wide as it is high; the line as a whole is as wide as what was painted.
        const scale = (100 * width) / (letters.length * size);
        const runs = letters.map((letter) => {
          const place = placeOf(letter);
          return `/F${place >> 8} ${fixed(size)} Tf <${(place & 255).toString(16).padStart(2, "0")}> Tj`;
        });
        return [`BT 3 Tr ${fixed(scale)} Tz 1 0 0 1 ${fixed(x)} ${fixed(y)} Tm`, ...runs, "ET"];
      },
      fonts: () => {
        const letters = [...places.keys()];
        return Array.from({ length: Math.ceil(letters.length / 256) }, (_, number) => {
          const own = letters.slice(256 * number, 256 * number + 256);
          return { name: `F${number}`, table: unicodeTable(own), count: own.length };
        });
      },
    };
  }
}

/**
 * @param {string[]} letters by their codes
 * @returns {string} a CMap from codes to UTF-16
 */
function unicodeTable(letters) {
  const lines = letters.map((letter, code) => `<${code.toString(16).padStart(2, "0")}> <${utf16(letter)}>`);
  const blocks = [];
  for (let at = 0; at < lines.length; at += 100) {
    const block = lines.slice(at, at + 100);
    blocks.push(`${block.length} beginbfchar\n${block.join("\n")}\nendbfchar`);
  }
  return (
    "/CIDInit /ProcSet findresource begin 12 dict begin begincmap\n/CMapName /Letters def /CMapType 2 def\n" +
    `1 begincodespacerange\n<00> <ff>\nendcodespacerange\n${blocks.join("\n")}\n` +
    "endcmap CMapName currentdict /CMap defineresource pop end end"
  );
}

/**
 * @param {Uint8ClampedArray} rgba opaque
 * @param {1|3} channels
 * @returns {Uint8Array<ArrayBuffer>}
 */
function samplesOf(rgba, channels) {
  const samples = new Uint8Array((rgba.length / 4) * channels);
  for (let from = 0, to = 0; from < rgba.length; from += 4)
    for (let channel = 0; channel < channels; channel++) samples[to++] = rgba[from + channel];
  return samples;
}

/**
 * @param {Uint8Array<ArrayBuffer>} bytes
 * @returns {Promise<Uint8Array<ArrayBuffer>>} in zlib's format
 */
async function deflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** @param {string} value */
function text(value) {
  return `<feff${utf16(value)}>`;
}

/** @param {string} value */
function utf16(value) {
  return Array.from({ length: value.length }, (_, at) => value.charCodeAt(at).toString(16).padStart(4, "0")).join("");
}

/** @param {number} value */
function fixed(value) {
  return String(Math.round(value * 1000) / 1000);
}
