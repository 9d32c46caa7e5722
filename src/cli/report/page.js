'use strict';
(() => {
  const { build, timeline, explanations, version } = JSON.parse(document.getElementById('content').textContent);
  const actions = build.actions || [];
  const from = timeline.from_unix_ms;
  const end = Math.max(timeline.to_unix_ms, from + 1);
  const critical = new Set(timeline.critical_path);
  const get = (id) => document.getElementById(id);

  // --- words and elements ------------------------------------------------------------------

  /** An element; strings among the children become text, never markup. */
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === 'key') element.style.setProperty('--key', `var(--${value})`);
      else if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
      else if (name === 'style') element.style.cssText += value;
      else element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  };
  const fill = (id, ...children) => get(id).replaceChildren(...children);
  const count = (n) => n.toLocaleString('en');
  const plural = (n, noun) => `${count(n)} ${noun}${n === 1 ? '' : 's'}`;
  const duration = (ms) => {
    if (ms === null || ms === undefined || !Number.isFinite(ms)) return '–';
    if (ms < 0) return '−' + duration(-ms);
    if (ms < 1000) return `${Math.round(ms)} ms`;
    if (ms < 60_000) return `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;
    if (ms < 3_600_000) return `${Math.floor(ms / 60_000)} min ${Math.floor((ms % 60_000) / 1000)} s`;
    return `${Math.floor(ms / 3_600_000)} h ${Math.floor((ms % 3_600_000) / 60_000)} min`;
  };
  const percent = (part, all) => (all > 0 ? `${(100 * part / all).toFixed(part === all ? 0 : 1)} %` : '–');
  const short = (digest) => (digest ? digest.slice(0, 12) : '–');

  // --- what the page says of one action ------------------------------------------------------

  const answerOf = (action) => (action.asked ? action.asked.answer : 'not asked');
  const keyOfAnswer = (answer) => (['cached', 'hit', 'joined', 'missed'].includes(answer) ? answer : 'unused');
  const waited = (action) => {
    const { asked } = action;
    return asked ? (asked.answered_unix_ms ?? end) - asked.at_unix_ms : null;
  };
  const lead = (action) => {
    const { primed } = action;
    // Who joined an execution used its result as it came.
    if (!primed || action.asked?.answer === 'joined' || primed.outcome !== 'primed' || primed.used_unix_ms == null || primed.ended_unix_ms == null) return null;
    const ms = primed.used_unix_ms - primed.ended_unix_ms;
    return ms >= 0 ? ms : null;
  };
  const execution = (action) => Math.max(action.primed?.execution_ms ?? 0, action.asked?.executed_ms ?? 0);
  const keyOfPriming = (primed) => {
    if (primed.outcome === 'failed') return 'failed';
    if (primed.outcome === 'running' || primed.outcome === 'queued') return 'joined';
    if (primed.used_unix_ms != null) return 'hit';
    return primed.outcome === 'primed' ? 'unused' : 'cached';
  };
  const sum = (numbers) => numbers.reduce((total, n) => total + n, 0);
  const median = (sorted) => (sorted.length ? sorted[Math.floor((sorted.length - 1) / 2)] : null);

  // --- head and totals --------------------------------------------------------------------------

  const running = build.ended_unix_ms == null;
  const took = (build.ended_unix_ms ?? end) - build.started_unix_ms;
  document.title = `${build.label} – primed report`;
  get('label').textContent = build.label;
  get('when').textContent = [
    new Date(build.started_unix_ms).toLocaleString(),
    running ? `still running after ${duration(took)}` : `took ${duration(took)}`,
    `build ${build.id}`,
  ].join('  ·  ');

  const leads = actions.map(lead).filter((ms) => ms !== null).sort((a, b) => a - b);
  const served = (build.hit || 0) + (build.joined || 0);
  const wasted = () => {
    const reasons = Object.entries(build.unused || {}).map(([reason, n]) => `${count(n)} ${reason.replaceAll('_', ' ')}`);
    return ['Execution time of what was executed ahead of time and nobody used', ...reasons].join('\n');
  };
  const total = (value, name, key, id, title) => make('div', { class: 'total', id: `total-${id}`, title: title || '', ...(key && { key }) },
    make('b', {}, value), make('span', {}, name));
  fill('totals',
    total(count(build.asked), 'asked', null, 'asked', 'Distinct actions that the client asked for'),
    total(count(build.cached), 'cached', 'cached', 'cached', 'Answered from the action cache without primed’s help'),
    total(count(build.hit), 'hit', 'hit', 'hit', 'Answered by a primed result'),
    total(count(build.joined), 'joined', 'joined', 'joined', 'Attached to an execution under way: primed’s, or another client’s'),
    total(count(build.missed), 'missed', 'missed', 'missed', 'Left to the client'),
    total(percent(served, served + build.missed), 'recall', null, 'recall', 'Hits and joins, of all that was not cached'),
    total(count(build.used), `used of ${count(build.primed)} primed`, null, 'used', 'Primed results, and how many of them the build used'),
    total(duration(median(leads)), 'median lead', null, 'lead', 'How long a primed result lay ready before it was used'),
    total(duration(build.saved_ms), 'saved', 'hit', 'saved', 'Execution time of hits, and the elapsed part of joins'),
    total(duration(build.wasted_ms ?? null), 'wasted', 'unused', 'wasted', wasted()),
  );
  const kinds = ['hit', 'joined', 'missed', 'cached'];
  get('answers').setAttribute('aria-label', kinds.map((kind) => `${build[kind]} ${kind}`).join(', '));
  fill('answers', ...kinds.filter((kind) => build[kind] > 0)
    .map((kind) => make('div', { key: kind, title: `${count(build[kind])} ${kind}`, style: `flex:${build[kind]}` })));

  // --- timeline ------------------------------------------------------------------------------------

  const legend = [['cached', 'cached'], ['hit', 'hit, or primed and used'], ['joined', 'joined'], ['missed', 'missed'],
    ['unused', 'primed, not used'], ['failed', 'failed']];
  fill('legend', ...legend.map(([key, name]) => make('span', { class: 'key', key }, name)));

  /** What is drawn: each with its row, its times since the first moment, and its colour. */
  const boxes = [];
  actions.forEach((action, index) => {
    const { asked, primed } = action;
    const lane = timeline.client.of_action[index];
    if (asked && lane != null) {
      boxes.push({ index, side: 0, lane, from: asked.at_unix_ms - from, to: (asked.answered_unix_ms ?? end) - from, key: keyOfAnswer(asked.answer) });
    }
    const ahead = timeline.speculative.of_action[index];
    if (primed && ahead != null) {
      boxes.push({ index, side: 1, lane: ahead, from: primed.started_unix_ms - from, to: (primed.ended_unix_ms ?? end) - from, key: keyOfPriming(primed) });
    }
  });
  const lanes = [timeline.client.count, timeline.speculative.count];
  // By row, sorted: what is in sight is found by halving, and little of it is drawn.
  const rows = [0, 1].map((side) => Array.from({ length: lanes[side] }, () => []));
  boxes.forEach((box) => rows[box.side][box.lane].push(box));
  rows.flat().forEach((row) => row.sort((a, b) => a.from - b.from));
  const boxOf = [new Map(), new Map()];
  boxes.forEach((box) => boxOf[box.side].set(box.index, box));

  const canvas = get('timeline');
  const scroll = get('scroll');
  const pen = canvas.getContext('2d');
  const TOP = 26, TITLE = 22, GAP = 10;
  const allLanes = lanes[0] + lanes[1];
  const laneHeight = allLanes <= 18 ? 18 : Math.max(4, Math.min(18, Math.floor(640 / allLanes)));
  const fullHeight = TOP + 2 * TITLE + GAP + allLanes * laneHeight + 8;
  const viewHeight = Math.max(120, Math.min(fullHeight, 560));
  scroll.style.height = `${viewHeight}px`;
  get('height').style.height = `${Math.max(0, fullHeight - viewHeight)}px`;
  const sideTop = [TOP + TITLE, TOP + TITLE + lanes[0] * laneHeight + GAP + TITLE];
  const range = end - from;
  const buildView = () => {
    const begin = Math.max(0, build.started_unix_ms - from);
    // What ran shortly before the build belongs to the picture.
    const before = boxes.filter((box) => box.side === 1 && box.from < begin && box.from > begin - (took || 1)).map((box) => box.from);
    const left = Math.min(begin, ...before.slice(0, 50_000));
    const right = Math.min(range, (build.ended_unix_ms ?? end) - from);
    const margin = Math.max(1, (right - left) * 0.015);
    return { left: left - margin, right: right + margin };
  };
  let view = buildView();
  let chosen = null;
  let width = 0;
  let colours = {};
  const readColours = () => {
    const style = getComputedStyle(document.documentElement);
    for (const name of ['paper', 'card', 'line', 'text', 'faint', 'cached', 'hit', 'joined', 'missed', 'unused', 'failed', 'critical', 'shade']) {
      colours[name] = style.getPropertyValue(`--${name}`).trim();
    }
  };
  const x = (t) => (t - view.left) / (view.right - view.left) * width;
  const top = (box) => sideTop[box.side] + box.lane * laneHeight - scroll.scrollTop;

  const axis = () => {
    const decimal = [0, 1, 2, 3, 4].flatMap((power) => [1, 2, 5].map((n) => n * 10 ** power)).slice(0, -1);
    const clock = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1440, 10_080].map((minutes) => minutes * 60_000);
    const step = [...decimal, ...clock].find((ms) => ms / (view.right - view.left) * width >= 90) || 1e9;
    pen.fillStyle = colours.card;
    pen.fillRect(0, 0, width, TOP);
    pen.strokeStyle = colours.line;
    pen.fillStyle = colours.faint;
    pen.textBaseline = 'middle';
    const origin = build.started_unix_ms - from;
    for (let t = Math.ceil((view.left - origin) / step) * step; t + origin <= view.right; t += step) {
      const at = Math.round(x(t + origin)) + 0.5;
      pen.beginPath();
      pen.moveTo(at, TOP - 6);
      pen.lineTo(at, TOP);
      pen.stroke();
      const seconds = t / 1000;
      pen.fillText(step < 60_000 ? `${+seconds.toFixed(3)} s` : step < 3_600_000 ? `${seconds / 60} min` : `${seconds / 3600} h`, at + 3, TOP - 12);
    }
    pen.beginPath();
    pen.moveTo(0, TOP - 0.5);
    pen.lineTo(width, TOP - 0.5);
    pen.stroke();
  };

  const drawRow = (row, y) => {
    const height = laneHeight > 6 ? laneHeight - 3 : Math.max(1, laneHeight - 1);
    let low = 0, high = row.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (row[middle].to < view.left) low = middle + 1; else high = middle;
    }
    let drawnTo = -1, drawnKey = '';
    for (let i = low; i < row.length && row[i].from <= view.right; i++) {
      const box = row[i];
      const left = Math.max(-2, x(box.from));
      const right = Math.min(width + 2, Math.max(left + 1.5, x(box.to)));
      if (right <= drawnTo && drawnKey === box.key) continue; // hidden by the pixel before
      pen.fillStyle = colours[box.key];
      pen.globalAlpha = chosen !== null && chosen !== box.index ? 0.45 : 1;
      pen.fillRect(left, y, right - left - (right - left > 3 ? 1 : 0), height);
      drawnTo = right;
      drawnKey = box.key;
      if (right - left > 64 && height >= 12) {
        const label = actions[box.index].label;
        const fits = Math.floor((right - left - 10) / 6.2);
        pen.fillStyle = '#fff';
        pen.fillText(label.length > fits ? '…' + label.slice(label.length - fits + 1) : label, Math.max(left, 0) + 5, y + height / 2 + 0.5);
      }
    }
    pen.globalAlpha = 1;
  };

  const arrow = (a, b, colour, thick) => {
    // From where the result lay ready (or the execution began, if it was joined) to its use.
    const ready = Math.min(a.to, Math.max(b.from, a.from));
    const [ax, ay] = [x(ready), top(a) + laneHeight / 2 - 2];
    const [bx, by] = [x(Math.max(b.from, ready)), top(b) + laneHeight / 2 - 2];
    pen.strokeStyle = colour;
    pen.lineWidth = thick;
    pen.beginPath();
    pen.moveTo(ax, ay);
    pen.bezierCurveTo(ax + (bx - ax) * 0.5 + 12, ay, bx - (bx - ax) * 0.5 - 12, by, bx, by);
    pen.stroke();
    pen.fillStyle = colour;
    pen.beginPath();
    pen.arc(bx, by, thick + 1.5, 0, 7);
    pen.fill();
    pen.lineWidth = 1;
  };

  const criticalLine = () => {
    pen.strokeStyle = pen.fillStyle = colours.critical;
    const path = timeline.critical_path.map((index) => boxOf[0].get(index) || boxOf[1].get(index))
      .filter((box) => box && box.to >= view.left && box.from <= view.right);
    // A line below each, and from one to the next as long as these can be told apart.
    const joined = path.length < width / 8;
    const under = Math.min(3, laneHeight / 2);
    pen.lineWidth = 1.5;
    path.forEach((box, n) => {
      const left = x(box.from), right = Math.max(left + 1, x(box.to));
      const y = top(box) + laneHeight - under;
      pen.fillRect(left, y, right - left, under);
      if (n === 0 || !joined) return;
      const before = path[n - 1];
      const fromX = x(before.to) - 0.75, fromY = top(before) + laneHeight - under / 2;
      pen.beginPath();
      pen.moveTo(fromX, fromY);
      pen.lineTo(fromX, y + under / 2);
      pen.lineTo(left, y + under / 2);
      pen.stroke();
    });
    pen.lineWidth = 1;
  };

  const draw = () => {
    pen.clearRect(0, 0, width, viewHeight);
    pen.font = '11px system-ui, "DejaVu Sans", sans-serif';
    pen.textBaseline = 'middle';
    pen.save();
    pen.beginPath();
    pen.rect(0, TOP, width, viewHeight - TOP);
    pen.clip();
    const begin = x(build.started_unix_ms - from), stop = x((build.ended_unix_ms ?? end) - from);
    pen.fillStyle = colours.shade;
    pen.fillRect(begin, TOP, Math.max(1, stop - begin), viewHeight);
    [0, 1].forEach((side) => {
      const titles = [`Client calls`, `Executed ahead of time`];
      pen.fillStyle = colours.faint;
      pen.font = '600 12px system-ui, "DejaVu Sans", sans-serif';
      const many = lanes[side] ? plural(lanes[side], 'lane') : 'none';
      pen.fillText(`${titles[side]} · ${many}`, 6, sideTop[side] - 11 - scroll.scrollTop);
      pen.font = '11px system-ui, "DejaVu Sans", sans-serif';
      rows[side].forEach((row, lane) => {
        const y = sideTop[side] + lane * laneHeight - scroll.scrollTop;
        if (y > TOP - laneHeight && y < viewHeight) drawRow(row, y);
      });
    });
    const inSight = actions.length > 0 && boxes.length < 1200;
    if (inSight && chosen === null) {
      pen.globalAlpha = Math.max(0.12, Math.min(0.5, 25 / (boxOf[1].size || 1)));
      for (const [index, box] of boxOf[1]) {
        const used = boxOf[0].get(index);
        if (used && actions[index].primed.used_unix_ms != null) arrow(box, used, colours.hit, 1);
      }
      pen.globalAlpha = 1;
    }
    if (get('critical').checked) criticalLine();
    if (chosen !== null) {
      const [a, b] = [boxOf[1].get(chosen), boxOf[0].get(chosen)];
      if (a && b) arrow(a, b, colours.text, 2);
      for (const box of [a, b]) {
        if (!box) continue;
        pen.strokeStyle = colours.text;
        pen.lineWidth = 2;
        pen.strokeRect(x(box.from) - 1, top(box) - 1, Math.max(3, x(box.to) - x(box.from)) + 1, Math.max(4, laneHeight - 1));
        pen.lineWidth = 1;
      }
    }
    pen.restore();
    axis();
  };
  let due = false;
  const redraw = () => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => { due = false; draw(); });
  };
  const resize = () => {
    const ratio = window.devicePixelRatio || 1;
    width = scroll.clientWidth;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(viewHeight * ratio);
    canvas.style.height = `${viewHeight}px`;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    draw();
  };

  const zoom = (factor, at = width / 2) => {
    const t = view.left + (view.right - view.left) * at / Math.max(width, 1);
    const span = Math.min(Math.max((view.right - view.left) * factor, 2), range * 3 + 10);
    const share = (t - view.left) / (view.right - view.left);
    view = { left: t - span * share, right: t + span * (1 - share) };
    redraw();
  };
  const move = (share) => {
    const by = (view.right - view.left) * share;
    view = { left: view.left + by, right: view.right + by };
    redraw();
  };
  const showAll = () => {
    view = { left: -range * 0.015 - 1, right: range * 1.015 + 1 };
    redraw();
  };
  const boxAt = (px, py) => {
    if (py < TOP) return null;
    const y = py + scroll.scrollTop;
    const side = y >= sideTop[1] ? 1 : 0;
    const row = rows[side][Math.floor((y - sideTop[side]) / laneHeight)];
    if (!row) return null;
    let best = null, distance = 3;
    for (const box of row) {
      const away = Math.max(x(box.from) - px, px - x(box.to), 0);
      if (away < distance) { best = box; distance = away; }
      if (x(box.from) > px + 3) break;
    }
    return best;
  };

  const facts = (action, all) => {
    const { asked, primed } = action;
    const since = (at) => (at == null ? '–' : `${((at - build.started_unix_ms) / 1000).toFixed(3)} s`);
    const list = [];
    if (asked) list.push(['asked', `at ${since(asked.at_unix_ms)}, ${asked.answer} after ${duration(waited(action))}`]);
    else list.push(['asked', 'never']);
    if (asked?.executed_ms) list.push(['executed', `for ${duration(asked.executed_ms)}`]);
    if (primed) {
      const ran = primed.started_unix_ms != null ? `, ran at ${since(primed.started_unix_ms)} for ${duration((primed.ended_unix_ms ?? end) - primed.started_unix_ms)}` : '';
      list.push(['primed', `${primed.outcome}${ran}`]);
      if (primed.reason) list.push(['because', primed.reason]);
      if (primed.used_unix_ms != null) list.push(['used', `at ${since(primed.used_unix_ms)}${lead(action) !== null ? `, ${duration(lead(action))} after it was ready` : ''}`]);
      if (all) {
        list.push(['planned', `at ${since(primed.planned_unix_ms)}, by ${primed.trigger}`]);
        if (primed.execution_ms) list.push(['worker', duration(primed.execution_ms)]);
        (primed.changes || []).slice(0, 20).forEach((change, n) => {
          const whence = change.origin && change.origin !== change.path ? `, from ${change.origin}` : '';
          list.push([n ? '' : 'changes', `${change.path}: ${short(change.from)} → ${short(change.to)} (${change.by}${whence})`]);
        });
        if ((primed.changes || []).length > 20) list.push(['', `and ${count(primed.changes.length - 20)} more`]);
        if ((primed.after || []).length) list.push(['after', `${plural(primed.after.length, 'other action')}`]);
      }
    }
    if (all) {
      list.push(['action', make('code', {}, action.action)]);
      if (action.base) list.push(['adapted from', make('code', {}, action.base)]);
      const said = explanation(action);
      if (said) list.push(['explained', make('div', { class: 'said mono' }, said)]);
    }
    return make('dl', {}, ...list.flatMap(([name, value]) => [make('dt', {}, name), make('dd', {}, value)]));
  };
  const explanation = (action) => {
    return Object.hasOwn(explanations, action.action) ? explanations[action.action] : null;
  };

  /** Chooses an action, here and in the table; `bring` moves the timeline to it. */
  const choose = (index, bring) => {
    chosen = index;
    get('details').hidden = index === null;
    if (index !== null) {
      const action = actions[index];
      fill('details', make('b', {}, action.label), critical.has(index) ? make('small', {}, '  on the critical path') : null, facts(action, true));
      const box = boxOf[0].get(index) || boxOf[1].get(index);
      if (bring && box) {
        const both = [boxOf[0].get(index), boxOf[1].get(index)].filter(Boolean);
        const left = Math.min(...both.map((one) => one.from)), right = Math.max(...both.map((one) => one.to));
        if (left < view.left || right > view.right) {
          const span = Math.max(view.right - view.left, (right - left) * 1.3);
          view = { left: (left + right - span) / 2, right: (left + right + span) / 2 };
        }
        const y = top(box);
        if (y < TOP || y > viewHeight - laneHeight) scroll.scrollTop += y - viewHeight / 2;
      }
    }
    redraw();
    drawRows();
  };

  let drag = null;
  scroll.addEventListener('pointerdown', (event) => {
    if (event.offsetX > scroll.clientWidth) return;
    drag = { x: event.clientX, y: event.clientY, moved: false };
    scroll.setPointerCapture(event.pointerId);
  });
  scroll.addEventListener('pointermove', (event) => {
    const place = canvas.getBoundingClientRect();
    if (drag) {
      const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
      if (drag.moved || Math.abs(dx) + Math.abs(dy) > 3) {
        move(-dx / width);
        scroll.scrollTop -= dy;
        drag = { x: event.clientX, y: event.clientY, moved: true };
      }
      get('tip').hidden = true;
      return;
    }
    const box = boxAt(event.clientX - place.left, event.clientY - place.top);
    const tip = get('tip');
    tip.hidden = !box;
    if (box) {
      tip.replaceChildren(make('b', {}, actions[box.index].label), facts(actions[box.index], false));
      const { width: w, height: h } = tip.getBoundingClientRect();
      tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - w - 8))}px`;
      tip.style.top = `${event.clientY + 18 + h > innerHeight ? Math.max(4, event.clientY - h - 12) : event.clientY + 18}px`;
    }
  });
  scroll.addEventListener('pointerup', (event) => {
    const place = canvas.getBoundingClientRect();
    if (drag && !drag.moved) choose(boxAt(event.clientX - place.left, event.clientY - place.top)?.index ?? null, false);
    drag = null;
  });
  scroll.addEventListener('pointerleave', () => { get('tip').hidden = true; });
  // A plain wheel scrolls the page, as everywhere; with Ctrl or Shift, or sideways, it is the timeline's.
  scroll.addEventListener('wheel', (event) => {
    const place = canvas.getBoundingClientRect();
    if (event.ctrlKey || event.metaKey) zoom(Math.exp(event.deltaY * 0.002), event.clientX - place.left);
    else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) move((event.deltaX || event.deltaY) / width);
    else return;
    event.preventDefault();
  }, { passive: false });
  scroll.addEventListener('dblclick', (event) => zoom(0.4, event.clientX - canvas.getBoundingClientRect().left));
  scroll.addEventListener('scroll', redraw);
  scroll.addEventListener('keydown', (event) => {
    const does = {
      '+': () => zoom(0.7), '=': () => zoom(0.7), '-': () => zoom(1.4), '0': showAll, b: () => { view = buildView(); redraw(); },
      ArrowLeft: () => move(-0.15), ArrowRight: () => move(0.15), Escape: () => choose(null),
    }[event.key];
    if (does && !event.ctrlKey && !event.metaKey) { does(); event.preventDefault(); }
  });
  get('zoom-in').addEventListener('click', () => zoom(0.6));
  get('zoom-out').addEventListener('click', () => zoom(1 / 0.6));
  get('zoom-build').addEventListener('click', () => { view = buildView(); redraw(); });
  get('zoom-all').addEventListener('click', showAll);
  get('critical').addEventListener('change', redraw);

  // --- leads ------------------------------------------------------------------------------------------

  const histogram = () => {
    if (leads.length === 0) return make('p', { class: 'none' }, 'No primed result lay ready before it was used.');
    const edges = [0, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 60_000, 300_000, 3_600_000];
    const bins = edges.map((edge, n) => leads.filter((ms) => ms >= edge && (n + 1 === edges.length || ms < edges[n + 1])).length);
    let last = bins.length - 1;
    while (last > 4 && bins[last] === 0) last--;
    const [w, h, base] = [640, 190, 160];
    const step = w / (last + 1);
    const most = Math.max(...bins);
    const picture = get('leads-picture');
    const svg = (tag, attributes, text) => {
      const element = document.createElementNS(picture.namespaceURI, tag);
      for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
      if (text !== undefined) element.textContent = text;
      return element;
    };
    picture.setAttribute('viewBox', `0 0 ${w} ${h}`);
    picture.removeAttribute('hidden');
    const tick = (ms) => (ms < 1000 ? `${ms} ms` : ms < 60_000 ? `${ms / 1000} s` : ms < 3_600_000 ? `${ms / 60_000} min` : '1 h');
    bins.slice(0, last + 1).forEach((n, bin) => {
      const height = n ? Math.max(2, n / most * (base - 22)) : 0;
      picture.append(svg('rect', { x: bin * step + 2, y: base - height, width: step - 4, height, rx: 3 }));
      if (n) picture.append(svg('text', { x: (bin + 0.5) * step, y: base - height - 6, 'text-anchor': 'middle' }, count(n)));
      picture.append(svg('text', { x: bin * step + 2, y: base + 15 }, `${bin === last && last + 1 === edges.length ? '> ' : ''}${tick(edges[bin])}`));
    });
    const at = (share) => leads[Math.min(leads.length - 1, Math.floor(share * leads.length))];
    return make('small', {}, `${plural(leads.length, 'use')}: half of them after at most ${duration(median(leads))}, 19 of 20 after at most ${duration(at(0.95))}`);
  };
  fill('leads', histogram());

  // --- slowest and missed ---------------------------------------------------------------------------

  const everyIndex = actions.map((_, index) => index);
  const slowest = everyIndex.filter((index) => execution(actions[index]) > 0)
    .sort((a, b) => execution(actions[b]) - execution(actions[a])).slice(0, 8);
  const slowestTime = slowest.length ? execution(actions[slowest[0]]) : 1;
  fill('slowest', ...(slowest.length ? slowest.map((index) => {
    const action = actions[index];
    const key = action.asked ? keyOfAnswer(action.asked.answer) : keyOfPriming(action.primed);
    return make('div', { class: 'bar', key, title: `${action.label}: ${answerOf(action)}`, onclick: () => choose(index, true) },
      make('span', {}, make('bdi', {}, action.label)), make('i', { style: `width:${100 * execution(action) / slowestTime}%` }),
      make('span', { class: 'number' }, duration(execution(action))));
  }) : [make('p', { class: 'none' }, 'Nothing says how long anything ran.')]));
  slowest.forEach((index, n) => get('slowest').children[n].children[1].style.setProperty('background',
    `var(--${actions[index].asked ? keyOfAnswer(actions[index].asked.answer) : keyOfPriming(actions[index].primed)})`));

  const why = ({ primed }) => {
    if (!primed) return 'Nothing was primed for it: no action with this command was recorded, or none whose inputs changed.';
    const words = {
      unresolved: 'It could not be foreseen',
      unadaptable: 'Its record could not be adapted',
      failed: 'It failed when primed executed it, and so was left to the client',
      abandoned: 'Its execution ahead of time was given up',
      queued: 'It waited for its turn when the client asked',
      running: 'It was running when the client asked',
      primed: 'It was not there yet when the client asked',
    };
    const what = words[primed.outcome] || `It was planned, and ended as ${primed.outcome}`;
    return `${what}${primed.reason ? `: ${primed.reason}` : ''}.`;
  };
  const missed = everyIndex.filter((index) => answerOf(actions[index]) === 'missed');
  get('missed-count').textContent = missed.length ? `${plural(missed.length, 'action')} left to the client` : '';
  const reasons = new Map();
  missed.forEach((index) => {
    const reason = why(actions[index]);
    reasons.set(reason, [...(reasons.get(reason) || []), index]);
  });
  fill('missed', ...(missed.length ? [...reasons].sort((a, b) => b[1].length - a[1].length).slice(0, 30).map(([reason, indexes]) =>
    make('div', { class: 'reason' }, make('b', {}, `${count(indexes.length)} × `), reason,
      make('ul', {}, ...indexes.slice(0, 9).map((index) => make('li', {},
        make('button', { onclick: () => choose(index, true) }, actions[index].label),
        explanation(actions[index]) ? make('div', { class: 'said mono' }, explanation(actions[index])) : null)),
      indexes.length > 9 ? make('li', {}, make('button', { onclick: () => search('', 'missed') }, `and ${count(indexes.length - 9)} more`)) : null)))
    : [make('p', { class: 'none' }, build.asked > 0 ? 'Nothing: all that was asked for was there, or on its way.' : 'Nothing was asked for.')]));

  // --- table ------------------------------------------------------------------------------------------------

  const fields = [
    ['action', (a) => a.label], ['answer', answerOf], ['primed', (a) => a.primed?.outcome ?? ''],
    ['asked at', (a) => (a.asked ? a.asked.at_unix_ms - build.started_unix_ms : null)], ['waited', waited], ['executed', (a) => execution(a) || null],
    ['lead', lead], ['digest', (a) => a.action],
  ];
  const ROW = 26;
  const filters = new Set(['cached', 'hit', 'joined', 'missed', 'not asked']);
  let sorted = { field: 3, down: false };
  let shown = [];
  const refresh = () => {
    const words = get('search').value.toLowerCase().split(/\s+/).filter(Boolean);
    const value = fields[sorted.field][1];
    shown = everyIndex.filter((index) => {
      const action = actions[index];
      if (!filters.has(answerOf(action))) return false;
      const text = `${action.label} ${action.action}`.toLowerCase();
      return words.every((word) => text.includes(word));
    });
    const values = new Map(shown.map((index) => [index, value(actions[index])]));
    shown.sort((a, b) => {
      const [one, other] = [values.get(a), values.get(b)];
      if (one === null || other === null) return one === other ? a - b : one === null ? 1 : -1; // the unknown last
      const order = one < other ? -1 : one > other ? 1 : a - b;
      return sorted.down ? -order : order;
    });
    get('shown').textContent = shown.length === actions.length ? count(actions.length) : `${count(shown.length)} of ${count(actions.length)}`;
    get('rows').style.height = `${shown.length * ROW}px`;
    fill('columns', ...fields.map(([name], n) => make('button', {
      class: n > 2 && n < 7 ? 'number' : '', onclick: () => { sorted = { field: n, down: sorted.field === n && !sorted.down }; refresh(); },
      ...(sorted.field === n && { 'aria-sort': sorted.down ? 'descending' : 'ascending' }),
    }, name)));
    fill('filters', ...[...new Set(['hit', 'joined', 'missed', 'cached', 'not asked'])].map((kind) => make('button', {
      'aria-pressed': String(filters.has(kind)), onclick: () => { if (!filters.delete(kind)) filters.add(kind); refresh(); },
    }, kind)));
    drawRows();
  };
  /** Only the rows in sight exist. */
  const drawRows = () => {
    const table = get('table');
    const first = Math.max(0, Math.floor(table.scrollTop / ROW) - 4);
    const visible = shown.slice(first, first + Math.ceil(table.clientHeight / ROW) + 8);
    fill('rows', ...visible.map((index, n) => {
      const action = actions[index];
      const priming = action.primed ? make('span', { class: 'dot', key: keyOfPriming(action.primed) }, action.primed.outcome) : make('span');
      return make('div', { class: `row${index === chosen ? ' chosen' : ''}`, role: 'row', style: `top:${(first + n) * ROW}px`, onclick: () => { choose(index, true); scroll.scrollIntoView({ block: 'nearest' }); } },
        make('span', { title: action.label }, action.label),
        make('span', { class: 'dot', key: keyOfAnswer(answerOf(action)) }, answerOf(action)), priming,
        make('span', { class: 'number' }, action.asked ? `${(Math.max(0, fields[3][1](action)) / 1000).toFixed(2)} s` : '–'),
        make('span', { class: 'number' }, duration(waited(action))),
        make('span', { class: 'number' }, execution(action) ? duration(execution(action)) : '–'),
        make('span', { class: 'number' }, duration(lead(action))),
        make('code', { title: action.action }, short(action.action)));
    }));
  };
  const search = (words, kind) => {
    get('search').value = words;
    filters.clear();
    (kind ? [kind] : ['cached', 'hit', 'joined', 'missed', 'not asked']).forEach((one) => filters.add(one));
    refresh();
    get('table').scrollIntoView({ block: 'center' });
  };
  get('search').addEventListener('input', () => { get('table').scrollTop = 0; refresh(); });
  get('table').addEventListener('scroll', drawRows);

  get('footer').textContent = [
    `primed ${version}`,
    `critical path: ${plural(timeline.critical_path.length, 'action')}, ${duration(sum(timeline.critical_path.map((index) => waited(actions[index]) ?? 0)))}`,
    build.left_out ? `${plural(build.left_out, 'more action')} left out of the journal` : null,
  ].filter(Boolean).join('  ·  ');

  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => { readColours(); redraw(); });
  addEventListener('resize', resize);
  readColours();
  refresh();
  resize();
  document.documentElement.dataset.ready = String(boxes.length);
})();
