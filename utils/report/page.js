"use strict";
const form = document.getElementById("filter"), list = document.getElementById("samples");
const cards = [...list.children].map(card => ({
  card, prompt: card.firstElementChild.textContent.toLowerCase(),
  answers: [...card.lastElementChild.children].map(answer => ({
    answer, text: answer.textContent.toLowerCase(), ...answer.dataset,
  })),
}));
const PLACE = { // of a card: the card with the smallest one comes first; without scores last
  newest: shown => -Math.max(...shown.map(x => Number(x.step))),
  highest: shown => -Math.max(...shown.map(x => Number(x.score ?? -Infinity))),
  lowest: shown => Math.min(...shown.map(x => Number(x.score ?? Infinity))),
  shortest: shown => Math.min(...shown.map(x => Number(x.length))),
};
function apply() {
  const field = name => form.elements[name]?.value ?? "";
  const words = field("words").toLowerCase().split(/\s+/).filter(Boolean), place = PLACE[field("order")];
  let count = 0;
  for (const card of cards) {
    const shown = card.answers.filter(x => {
      const chosen = ["held", "step", "run"].every(name => !field(name) || field(name) === x[name]);
      x.answer.hidden = !(chosen && words.every(word => card.prompt.includes(word) || x.text.includes(word)));
      return !x.answer.hidden;
    });
    card.card.hidden = !shown.length;
    card.place = shown.length ? place(shown) : Infinity;
    count += shown.length;
  }
  list.append(...[...cards].sort((a, b) => a.place - b.place || 0).map(x => x.card));
  form.elements.count.value = `${count} answers`;
}
form.hidden = false;
form.addEventListener("input", apply);
form.addEventListener("submit", event => event.preventDefault());
apply();
