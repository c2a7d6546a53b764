// The page of a model: the settings in its URL, pictures that a visitor gives, a brush, and the slider over t.
window.genmod = (() => {
  const given = {}; // by tab: the file as a data URL
  let tab = null;

  const areaOf = (element) => element.closest(".genmod-give");

  // The values of the settings that the tab uses, where they are not the defaults, as the query of the URL.
  function intoUrl(values, defaults, tabs) {
    const names = Object.keys(defaults);
    const all = Object.fromEntries(names.map((name, i) => [name, values[i]]));
    tab = all.do;
    const kept = (tabs[tab] || []).filter((name) => {
      const isLatent = /^z\d+$/.test(name);
      return all[name] !== null && all[name] !== undefined && (isLatent || all[name] !== defaults[name]);
    });
    const t = new URLSearchParams(window.location.search).get("t");
    const entries = kept.map((name) => [name, all[name]]);
    write(new URLSearchParams(t !== null && tab === "steps" ? [...entries, ["t", t]] : entries).toString());
  }

  function write(query) {
    const place = window.location.pathname + (query ? "?" + query : "");
    window.history.replaceState(window.history.state, "", place + window.location.hash);
    if (window.parent !== window) { // in a Space, the address bar is that of the page around this one
      window.parent.postMessage({ queryString: query }, "https://huggingface.co");
    }
  }

  // The values of an event, with the picture of the tab as the last.
  function withPicture(values) {
    const area = document.querySelector(`.genmod-give[data-tab="${values[0]}"]`);
    const sent = area && given[values[0]] ? { picture: given[values[0]], mask: maskOf(area) } : null;
    return [...values.slice(0, -1), sent];
  }

  function maskOf(area) {
    const paint = area.querySelector(".genmod-paint");
    if (!paint || !paint.width) return null;
    const pixels = paint.getContext("2d").getImageData(0, 0, paint.width, paint.height).data;
    return pixels.some((value, i) => i % 4 === 3 && value > 127) ? paint.toDataURL("image/png") : null;
  }

  // Shows a picture in the size of the model, cropped to its middle, or in its own.
  function show(area, url) {
    const image = new Image();
    image.onload = () => {
      const width = +area.dataset.width || image.width;
      const height = +area.dataset.height || image.height;
      const scale = Math.max(width / image.width, height / image.height);
      area.querySelectorAll("canvas").forEach((canvas) => { canvas.width = width; canvas.height = height; });
      const [w, h] = [scale * image.width, scale * image.height];
      area.querySelector(".genmod-shown").getContext("2d").drawImage(image, (width - w) / 2, (height - h) / 2, w, h);
      area.querySelector(".genmod-canvas").hidden = false;
      area.dataset.ready = "yes";
    };
    image.onerror = () => { area.querySelector(".genmod-canvas").hidden = true; area.dataset.ready = "no"; };
    image.src = url;
  }

  // Paints whole pixels of the model, those whose centre the brush reaches, on the way from the last place.
  let last = null;
  function paintTo(canvas, event) {
    const box = canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * canvas.width;
    const y = ((event.clientY - box.top) / box.height) * canvas.height;
    const brush = +areaOf(canvas).querySelector(".genmod-brush").value;
    const radius = Math.max(0.71, (brush * Math.max(canvas.width, canvas.height)) / 32);
    const from = event.type === "pointerdown" || !last ? [x, y] : last;
    const count = Math.ceil(Math.hypot(x - from[0], y - from[1])) + 1;
    const pen = canvas.getContext("2d");
    pen.fillStyle = "#ff6a00";
    for (let k = 1; k <= count; k++) {
      const [u, v] = [from[0] + ((x - from[0]) * k) / count, from[1] + ((y - from[1]) * k) / count];
      for (let i = Math.floor(u - radius); i <= u + radius; i++) {
        for (let j = Math.floor(v - radius); j <= v + radius; j++) {
          if (Math.hypot(i + 0.5 - u, j + 0.5 - v) <= radius) pen.fillRect(i, j, 1, 1);
        }
      }
    }
    last = [x, y];
  }

  document.addEventListener("change", (event) => {
    const input = event.target;
    if (!input.matches || !input.matches(".genmod-file input") || !input.files.length) return;
    const area = areaOf(input), reader = new FileReader();
    reader.onload = () => { given[area.dataset.tab] = reader.result; show(area, reader.result); };
    reader.readAsDataURL(input.files[0]);
  });
  document.addEventListener("click", (event) => {
    if (!event.target.matches(".genmod-clear")) return;
    const paint = areaOf(event.target).querySelector(".genmod-paint");
    paint.getContext("2d").clearRect(0, 0, paint.width, paint.height);
  });
  for (const kind of ["pointerdown", "pointermove"]) {
    document.addEventListener(kind, (event) => {
      if (event.buttons && event.target.matches && event.target.matches(".genmod-paint")) paintTo(event.target, event);
    });
  }
  // The slider over t.
  function showStep(slider) {
    const t = slider.dataset.times.split(",")[+slider.value];
    const all = slider.closest(".genmod-trajectory");
    all.querySelector("output").value = t;
    all.querySelectorAll("img").forEach((image) => { image.hidden = image.dataset.t !== t; });
    return t;
  }
  document.addEventListener("input", (event) => {
    if (!event.target.matches(".genmod-time input")) return;
    const query = new URLSearchParams(window.location.search);
    query.set("t", showStep(event.target));
    write(query.toString());
  });
  new MutationObserver(() => { // a slider that is new stands at the t of the URL
    const slider = document.querySelector(".genmod-time input:not([data-seen])");
    if (!slider) return;
    slider.dataset.seen = "yes";
    const t = new URLSearchParams(window.location.search).get("t");
    const place = slider.dataset.times.split(",").indexOf(t);
    if (place >= 0) { slider.value = place; showStep(slider); }
  }).observe(document.documentElement, { childList: true, subtree: true });
  return { intoUrl, withPicture };
})();
