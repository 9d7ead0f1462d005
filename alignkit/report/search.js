for (const form of document.querySelectorAll('form.search')) {
  const box = form.querySelector('input[type=search]'), only = form.querySelector('input[type=checkbox]');
  const state = form.querySelector('output'), cards = [...form.parentElement.querySelectorAll('article.card')];
  const texts = cards.map(card => card.textContent.toLowerCase());
  const show = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let n = 0;
    cards.forEach((card, i) => {
      card.hidden = !words.every(w => texts[i].includes(w)) || (only.checked && !('changed' in card.dataset));
      n += !card.hidden;
    });
    state.textContent = n + ' of ' + cards.length + ' rows';
  };
  form.addEventListener('input', show);
  form.addEventListener('submit', e => e.preventDefault());
  form.hidden = false;
  show();
}
addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(d => { d.open = true; }));
