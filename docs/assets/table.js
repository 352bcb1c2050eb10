// What the tables of the browse page and of the benchmark share: words to search for, rows in the order of a column,
// files to save.
const vitxTable = {
  // The text in small letters without accents, one space between words: both sides of a search go through this.
  fold(text) {
    const letters = { ł: "l", ø: "o", đ: "d", ı: "i", ß: "ss", æ: "ae", œ: "oe" };
    const plain = text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
    return plain.replace(/[łøđıßæœ]/g, (letter) => letters[letter]).replace(/\s+/g, " ").trim();
  },

  // Orders `rows` by value(row), a number or a text; what has none (NaN, "") stands last either way. Without a column
  // they stand as they are given.
  sort(table, rows, column, descending, value) {
    for (const head of table.tHead.rows[0].cells) head.removeAttribute("aria-sort");
    const sign = descending ? -1 : 1;
    const words = new Intl.Collator(document.documentElement.lang, { numeric: true });
    const none = (one) => one === "" || Number.isNaN(one);
    const compare = ([, one], [, other]) => {
      if (none(one) || none(other)) return none(one) - none(other);
      return sign * (typeof one === "number" ? one - other : words.compare(one, other));
    };
    let order = rows;
    if (column !== null) {
      table.tHead.rows[0].cells[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
      order = rows.map((row) => [row, value(row)]).sort(compare).map(([row]) => row);
    }
    table.tBodies[0].append(...order);
  },

  save(name, type, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  },
};
