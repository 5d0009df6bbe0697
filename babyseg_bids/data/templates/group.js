'use strict';
(() => {
  const $ = (id) => document.getElementById(id);
  const table = $('sessions-table');
  const body = table.tBodies[0];
  const PAGE = 100;
  // All rows in the order of the file; points of charts refer to rows by their number in it.
  const all = [...table.tBodies].flatMap((part) => [...part.rows]);
  [...table.tBodies].slice(1).forEach((part) => part.remove());
  // What flags say stands in the titles of their cells, and is searched too.
  const texts = all.map((row) => `${row.textContent} ${row.querySelector('.badge').title}`.toLowerCase());
  let order = all.map((_, i) => i);
  let shown = order;
  let page = 0;

  // Ratings that were not saved yet survive a reload, where the browser allows it.
  const store = `babyseg ratings ${location.pathname}`;
  let drafts = {};
  try { drafts = JSON.parse(localStorage.getItem(store)) || {}; } catch { drafts = {}; }
  const keep = () => {
    try { localStorage.setItem(store, JSON.stringify(drafts)); } catch { /* Private windows have no storage. */ }
  };
  const rating = (row) => drafts[row.dataset.name] ?? { rating: row.dataset.rating, comment: row.dataset.comment };

  const clean = (text) => text.replace(/\s+/g, ' ').trim();
  const settle = (row) => {
    const now = rating(row);
    if (now.rating === row.dataset.rating && clean(now.comment) === row.dataset.comment) delete drafts[row.dataset.name];
  };

  const rate = (row, change) => {
    const now = { ...rating(row), ...change };
    drafts[row.dataset.name] = now;
    settle(row);
    row.querySelector('.rate').dataset.sort = now.rating;
    keep();
    tell();
  };

  const tell = () => {
    const waiting = Object.keys(drafts).length;
    $('save-ratings').textContent = waiting ? `Save ratings (${waiting} changed)` : 'Save ratings';
  };

  // Only rows on the page in view get controls: thousands of them would slow the browser.
  const equip = (row) => {
    const cell = row.querySelector('.rate');
    if (cell.querySelector('select')) return;
    const select = document.createElement('select');
    select.setAttribute('aria-label', `Rating of ${row.dataset.name}`);
    for (const name of ['', 'accept', 'review', 'exclude']) {
      select.append(new Option(name || '–', name, false, rating(row).rating === name));
    }
    const comment = document.createElement('input');
    comment.type = 'text';
    comment.value = rating(row).comment;
    comment.placeholder = 'comment';
    comment.setAttribute('aria-label', `Comment on ${row.dataset.name}`);
    select.addEventListener('change', () => rate(row, { rating: select.value }));
    comment.addEventListener('input', () => rate(row, { comment: comment.value }));
    cell.replaceChildren(select, comment);
  };

  const draw = () => {
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const rows = shown.slice(page * PAGE, (page + 1) * PAGE).map((i) => all[i]);
    rows.forEach(equip);
    body.replaceChildren(...rows);
    $('pages').hidden = pages === 1;
    $('page-note').textContent = `Page ${page + 1} of ${pages}`;
    $('previous').disabled = page === 0;
    $('next').disabled = page === pages - 1;
    $('shown').textContent = `${shown.length} of ${all.length} sessions shown`;
  };

  const value = (row, column) => {
    const cell = row.cells[column];
    return 'sort' in cell.dataset ? cell.dataset.sort : cell.textContent.trim();
  };
  const collator = new Intl.Collator(undefined, { numeric: true });
  // Cells without a value stay at the end in both directions.
  const compare = (a, b, numeric, sign) => {
    if (a === '' || b === '') return (a === '') - (b === '');
    return sign * (numeric ? a - b : collator.compare(a, b));
  };

  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener('click', () => {
      const up = head.getAttribute('aria-sort') !== 'ascending';
      for (const other of head.parentNode.cells) other.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      const numeric = head.classList.contains('num') || 'number' in head.dataset;
      const keys = all.map((row) => value(row, column));
      order = [...order].sort((a, b) => compare(keys[a], keys[b], numeric, up ? 1 : -1));
      apply();
    });
  });

  const apply = () => {
    const words = $('filter').value.toLowerCase().split(/\s+/).filter(Boolean);
    const flagged = $('only-flagged').checked;
    const rated = $('only-rating').value;
    shown = order.filter((i) => {
      const row = all[i];
      if (flagged && !row.dataset.flagged) return false;
      if (rated && (rating(row).rating || '-') !== rated) return false;
      return words.every((word) => texts[i].includes(word));
    });
    page = 0;
    draw();
  };
  $('filter').addEventListener('input', apply);
  $('only-flagged').addEventListener('change', apply);
  $('only-rating').addEventListener('change', apply);
  $('previous').addEventListener('click', () => { page -= 1; draw(); });
  $('next').addEventListener('click', () => { page += 1; draw(); });

  const tsv = () => {
    const lines = ['participant_id\tsession_id\trating\tcomment'];
    for (const row of all) {
      const now = rating(row);
      if (!now.rating && !now.comment) continue;
      const [, subject, session] = row.dataset.name.match(/^(sub-.*?)(?:_(ses-.*))?$/);
      lines.push([subject, session ?? 'n/a', now.rating || 'n/a', clean(now.comment) || 'n/a'].join('\t'));
    }
    return `${lines.join('\n')}\n`;
  };
  $('save-ratings').addEventListener('click', () => {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([tsv()], { type: 'text/tab-separated-values' }));
    link.download = table.dataset.file;
    link.click();
    URL.revokeObjectURL(link.href);
  });

  // Charts with many points: the nearest one is named, and a click opens its report.
  const hint = $('hint');
  for (const svg of document.querySelectorAll('svg.chart:has(path.dots)')) {
    const points = [...svg.querySelectorAll('path.dots')].flatMap((path) => {
      const rows = path.dataset.rows.split(' ');
      const places = path.getAttribute('d').slice(1).split('M');
      return places.map((place, i) => [...place.slice(0, -2).split(' ').map(Number), Number(rows[i])]);
    });
    const title = svg.closest('figure').querySelector('figcaption').firstChild.textContent.trim();
    const column = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent.trim() === title);
    const nearest = (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      let best = null;
      let least = 10 ** 2;
      for (const point of points) {
        const far = (point[0] - at.x) ** 2 + (point[1] - at.y) ** 2;
        if (far < least) [best, least] = [point, far];
      }
      return best;
    };
    svg.addEventListener('pointermove', (event) => {
      const point = nearest(event);
      hint.hidden = !point;
      svg.style.cursor = point ? 'pointer' : '';
      if (!point) return;
      const row = all[point[2]];
      hint.textContent = `${row.dataset.name}: ${row.cells[column].textContent} mL at ${row.cells[2].textContent}`;
      hint.style.left = `${Math.min(event.pageX + 12, document.documentElement.clientWidth - 240)}px`;
      hint.style.top = `${event.pageY + 14}px`;
    });
    svg.addEventListener('pointerleave', () => { hint.hidden = true; });
    svg.addEventListener('click', (event) => {
      const point = nearest(event);
      const link = point && all[point[2]].cells[1].querySelector('a');
      if (link) location.href = link.getAttribute('href');
    });
  }

  $('tools').hidden = false;
  $('rating-tools').hidden = false;
  for (const row of all) {
    if (!drafts[row.dataset.name]) continue;
    // What the group level has read back is no draft any more.
    settle(row);
    row.querySelector('.rate').dataset.sort = rating(row).rating;
  }
  keep();
  tell();
  draw();
})();
