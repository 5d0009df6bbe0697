'use strict';
(() => {
  const table = document.getElementById('sessions-table');
  const body = table.tBodies[0];
  const filter = document.getElementById('filter');
  const onlyFlagged = document.getElementById('only-flagged');
  const shown = document.getElementById('shown');
  document.getElementById('tools').hidden = false;

  const value = (row, column) => {
    const cell = row.cells[column];
    return 'sort' in cell.dataset ? cell.dataset.sort : cell.textContent.trim();
  };

  // Cells without a value stay at the end in both directions.
  const compare = (a, b, numeric, sign) => {
    if (a === '' || b === '') return (a === '') - (b === '');
    return sign * (numeric ? a - b : a.localeCompare(b, undefined, { numeric: true }));
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
      const rows = [...body.rows].map((row) => [value(row, column), row]);
      rows.sort((a, b) => compare(a[0], b[0], numeric, up ? 1 : -1));
      body.append(...rows.map((pair) => pair[1]));
    });
  });

  const apply = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      const flagged = !onlyFlagged.checked || row.dataset.flagged === '1';
      const visible = flagged && words.every((word) => text.includes(word));
      row.hidden = !visible;
      count += visible;
    }
    shown.textContent = `${count} of ${body.rows.length} sessions shown`;
  };
  filter.addEventListener('input', apply);
  onlyFlagged.addEventListener('change', apply);
  apply();
})();
