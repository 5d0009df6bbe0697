'use strict';
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($('viewer-data').textContent);
  const frame = $('viewer-frame');
  const status = $('viewer-status');
  const position = ['x', 'y', 'z'].map((name) => $(`viewer-${name}`));
  let started = null;
  let nv = null;

  // The code of the viewer is kept gzipped; running it as text needs no network and no blob.
  const load = async () => {
    const bytes = Uint8Array.from(atob($('viewer-code').textContent.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
    const script = document.createElement('script');
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  };

  const colours = (chosen) => {
    const map = { R: [0], G: [0], B: [0], A: [0], I: [0] };
    data.structures.forEach(({ rgb }, place) => {
      const number = place + 1;
      [map.R, map.G, map.B].forEach((channel, i) => channel.push(rgb[i]));
      map.A.push(chosen === 0 || chosen === number ? 255 : 0);
      map.I.push(number);
    });
    return map;
  };

  const say = (place) => {
    const [x, y, z] = place.mm;
    const number = Math.round(place.values[1].value);
    const name = number ? data.structures[number - 1].name : 'no structure';
    const doubt = data.uncertainty && number ? `, uncertainty ${(place.values[2].value / 100).toFixed(2)}` : '';
    status.textContent = `${name}${doubt}`;
    [x, y, z].forEach((value, i) => {
      if (document.activeElement !== position[i]) position[i].value = value.toFixed(0);
    });
  };

  const jump = (mm) => {
    nv.scene.crosshairPos = nv.mm2frac(mm);
    nv.createOnLocationChange();
    nv.drawScene();
  };

  // The voxel of a structure that is nearest to its centre.
  const centre = (number) => {
    const volume = nv.volumes[1];
    const [, nx, ny] = volume.dimsRAS;
    const hits = [];
    volume.img2RAS().forEach((value, i) => { if (value === number) hits.push(i); });
    if (!hits.length) return null;
    const points = hits.map((i) => [i % nx, Math.floor(i / nx) % ny, Math.floor(i / nx / ny)]);
    const mean = [0, 1, 2].map((a) => points.reduce((sum, p) => sum + p[a], 0) / points.length);
    const far = (p) => p.reduce((sum, v, a) => sum + (v - mean[a]) ** 2, 0);
    const best = points.reduce((a, b) => (far(b) < far(a) ? b : a));
    return Array.from(nv.frac2mm(nv.vox2frac(best))).slice(0, 3);
  };

  const apply = () => {
    const chosen = Number($('viewer-structure').value);
    nv.volumes[1].setColormapLabel(colours(chosen));
    nv.volumes[1].opacity = $('viewer-opacity').value / 100;
    if (data.uncertainty) nv.volumes[2].opacity = $('viewer-doubt').value / 100;
    nv.opts.atlasOutline = $('viewer-outline').checked ? 1 : 0;
    nv.updateGLVolume();
  };

  const connect = () => {
    for (const id of ['viewer-opacity', 'viewer-doubt', 'viewer-outline']) {
      $(id)?.addEventListener('input', apply);
    }
    $('viewer-structure').addEventListener('change', (event) => {
      apply();
      const number = Number(event.target.value);
      const mm = number && centre(number);
      if (mm) jump(mm);
      else if (number) status.textContent = `${data.structures[number - 1].name} was not found`;
    });
    $('viewer-planes').addEventListener('change', (event) => nv.setSliceType(Number(event.target.value)));
    $('viewer-scan')?.addEventListener('change', (event) => {
      nv.volumes[0].img = nv.scans[Number(event.target.value)].img;
      nv.updateGLVolume();
    });
    for (const field of position) {
      field.addEventListener('change', () => jump(position.map((f) => Number(f.value))));
    }
    frame.querySelector('canvas').addEventListener('keydown', (event) => {
      const move = {
        ArrowLeft: [-1, 0, 0], ArrowRight: [1, 0, 0], ArrowDown: [0, -1, 0], ArrowUp: [0, 1, 0],
        PageDown: [0, 0, -1], PageUp: [0, 0, 1],
      }[event.key];
      if (!move) return;
      event.preventDefault();
      nv.moveCrosshairInVox(...move);
    });
  };

  const start = async () => {
    if (!document.createElement('canvas').getContext('webgl2')) {
      throw new Error('this browser has no WebGL 2');
    }
    status.textContent = 'Loading …';
    $('viewer').classList.add('open');
    await load();
    const { Niivue, NVImage } = window.niivue;
    nv = new Niivue({
      loadingText: '', dragAndDropEnabled: false, logLevel: 'error', crosshairColor: [1, 0.84, 0.4, 0.9],
      crosshairGap: 6, crosshairWidth: 0.5, isCornerOrientationText: true, scrollRequiresFocus: true, isNearestInterpolation: false,
      multiplanarShowRender: 0, fontColor: [1, 0.84, 0.4, 1],
    });
    nv.onLocationChange = say;
    await nv.attachToCanvas(frame.querySelector('canvas'));
    const read = (base64, name, more) => NVImage.loadFromBase64({ base64, name: `${name}.nii.gz`, ...more });
    const grey = { colormap: 'gray', cal_min: 0, cal_max: 255 };
    nv.scans = await Promise.all(data.scans.map((scan) => read(scan.data, 'scan', grey)));
    nv.addVolume(nv.scans[0]);
    nv.addVolume(await read(data.labels, 'labels', { opacity: 0.7 }));
    if (data.uncertainty) {
      const heat = { colormap: 'inferno', cal_min: 5, cal_max: 90, opacity: 0 };
      nv.addVolume(await read(data.uncertainty, 'uncertainty', heat));
    }
    nv.setInterpolation(false);
    apply();
    connect();
    nv.createOnLocationChange();
    $('viewer').dataset.state = 'ready';
  };

  const open = () => {
    started ??= start().catch((error) => {
      $('viewer').classList.remove('open');
      $('viewer-note').textContent = `The viewer cannot be shown (${error.message}); the pictures on this page show the same scan.`;
      $('viewer').dataset.state = 'failed';
    });
    return started;
  };

  $('viewer-note').textContent = 'Scroll or drag in a plane, or use the arrow keys and Page Up and Page Down. The names of structures follow the cross.';
  for (const link of document.querySelectorAll('a[data-mm]')) {
    link.addEventListener('click', async (event) => {
      event.preventDefault();
      $('viewer').scrollIntoView();
      await open();
      if (!nv) return;
      jump(link.dataset.mm.split(' ').map(Number));
      frame.querySelector('canvas').focus({ preventScroll: true });
    });
  }
  const seen = new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting)) {
      seen.disconnect();
      open();
    }
  });
  seen.observe($('viewer'));

  const copy = $('copy-methods');
  copy.hidden = false;
  copy.addEventListener('click', async () => {
    const range = document.createRange();
    range.selectNodeContents($('methods-text'));
    const selection = window.getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    const done = document.execCommand('copy');
    selection.removeAllRanges();
    copy.textContent = done ? 'Copied' : 'Select the text and copy it';
  });
})();
