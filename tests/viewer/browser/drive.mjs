// Drives a headless Chromium for tests/viewer/test_browser.py: node drive.mjs '{"what": "gallery" | "lab" | "playground" | "notebook", "url": ..., "out": folder}'
// Prints what was seen as one JSON object; the judging is done in Python. Needs playwright-core (`npm install --no-save
// playwright-core`, or PLAYWRIGHT_CORE=its folder) and a Chromium (CHROMIUM=path, default: the one in PATH).
import { mkdtempSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";

const { chromium } = createRequire(import.meta.url)(process.env.PLAYWRIGHT_CORE ?? "playwright-core");
const job = JSON.parse(process.argv[2]);
const seen = { errors: [], requests: [] };
const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];
const context = await chromium.launchPersistentContext(mkdtempSync(join(tmpdir(), "egm-browser-")), {
  executablePath: process.env.CHROMIUM, headless: true, args: FLAGS, viewport: { width: 1280, height: 900 }, acceptDownloads: true,
});
const page = await context.newPage();
page.setDefaultTimeout(job.timeout_ms ?? 120000);
page.on("console", (message) => { if (message.type() === "error") seen.errors.push(message.text()); });
page.on("pageerror", (error) => seen.errors.push(String(error)));
page.on("request", (request) => { if (!request.url().startsWith("data:")) seen.requests.push(request.url()); });

const shot = (name, options = {}) => page.screenshot({ path: join(job.out, `${name}.png`), ...options });
const text = (selector) => page.locator(selector).first().innerText();

// Each box in pixels of the original image, from where the browser has really put it on the screen.
const boxes = () => page.evaluate(() => {
  const drawing = document.querySelector(".egm-stage .egm-image");
  const image = drawing.querySelector("image").getBoundingClientRect();
  const x = drawing.dataset.width / image.width, y = drawing.dataset.height / image.height;
  return Object.fromEntries([...drawing.querySelectorAll(".egm-box")].map((group) => {
    const at = group.querySelector("rect").getBoundingClientRect();
    return [group.dataset.box, [(at.left - image.left) * x, (at.top - image.top) * y, (at.right - image.left) * x, (at.bottom - image.top) * y]];
  }));
});

// Marks of the steps: where the browser put them, in pixels of the original image.
const marks = () => page.evaluate(() => {
  const drawing = document.querySelector(".egm-stage .egm-image");
  const image = drawing.querySelector("image").getBoundingClientRect();
  const x = drawing.dataset.width / image.width, y = drawing.dataset.height / image.height;
  return Object.fromEntries([...drawing.querySelectorAll(".egm-mark")].map((mark) => {
    const at = mark.querySelector(".egm-dot circle:last-of-type").getBoundingClientRect();
    return [mark.dataset.step, [((at.left + at.right) / 2 - image.left) * x, ((at.top + at.bottom) / 2 - image.top) * y]];
  }));
});
const lit = (kind) => page.evaluate((selector) => [...document.querySelectorAll(selector)].map((node) => node.dataset.step), `${kind}.egm-on`);
const shown = () => page.evaluate(() => [...document.querySelectorAll(".egm-mark:not(.egm-later)")].length);

async function steps() {
  const seen = { marks: await marks() }, names = Object.keys(seen.marks), last = names.at(-1);
  await page.hover(`.egm-word[data-step="${last}"]`);
  seen.last = last;
  seen.lit_by_word = await lit(".egm-mark");
  await page.hover(`.egm-mark[data-step="${last}"] .egm-dot circle`, { force: true });
  seen.lit_by_mark = await lit(".egm-word");
  await page.focus(".egm-viewer");
  seen.all = await shown();
  await page.keyboard.press(",");
  seen.one_back = await shown();
  seen.slider = await text(".egm-slider span");
  await page.keyboard.press(".");
  seen.again = await shown();
  await page.fill(".egm-slider input", "0");
  seen.none = await shown();
  await page.fill(".egm-slider input", String(names.length));
  return seen;
}

async function gallery() {
  for (const [name, width, height] of [["desktop", 1280, 900], ["phone", 390, 844]]) {
    await page.setViewportSize({ width, height });
    await page.goto(job.url);
    await page.waitForSelector(".egm-image");
    const first = await text(".egm-of"), before = await text(".egm-side");
    await page.click(".egm-step[aria-label=next]");
    const clicked = await text(".egm-side");
    await page.focus(".egm-viewer");
    await page.keyboard.press("ArrowLeft");
    const back = await text(".egm-side");
    await page.click("#kinds button:last-child");
    seen[name] = {
      of: first, paged: clicked !== before, returned: back === before, kinds: await page.locator("#kinds button").count(),
      chosen: await page.locator("#kinds button:last-child").getAttribute("aria-pressed"),
      overflow_px: await page.evaluate(() => document.documentElement.scrollWidth - innerWidth),
    };
    await page.click("#kinds button:first-child");
    seen[name].expression = await text(".egm-expression");
    seen[name].steps = await steps();
    await shot(name);
    await shot(`${name}-whole`, { fullPage: true });
  }
}

// Opens the notebook and runs all its cells; a cell that fails ends the test.
async function runAll() {
  await page.goto(job.url);
  await page.waitForSelector(".jp-Notebook .jp-Cell");
  const idle = () => page.waitForFunction(() => document.querySelector("#jp-main-statusbar")?.innerText.includes("| Idle")); // the kernel
  await idle();
  await page.evaluate(() => window.jupyterapp.commands.execute("notebook:run-all-cells"));
  await idle();
  seen.cell_errors = await page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]').allInnerTexts();
  if (seen.cell_errors.length) throw new Error(seen.cell_errors[0]);
}

// The playground: types a question, watches the answer arrive, asks without reasoning, edits, drags, opens a file.
async function playground() {
  await runAll();
  await page.locator(".egm-playground").scrollIntoViewIfNeeded();
  await page.waitForSelector(".egm-playground .egm-image");
  // What each card said while its answer was written.
  await page.evaluate(() => {
    window.cards = [];
    new MutationObserver(() => {
      const card = [...document.querySelectorAll(".egm-card")].at(-1);
      if (card) window.cards.push([card.querySelector(".egm-verdict")?.innerText, card.querySelector(".egm-reasoning")?.innerText.length ?? 0, document.querySelectorAll(".egm-mark").length]);
    }).observe(document.querySelector(".egm-playground .egm-main"), { childList: true });
  });
  const done = (count) => page.waitForFunction((number) => {
    const names = [...document.querySelectorAll(".egm-card .egm-verdict")].map((node) => node.innerText);
    return !document.querySelector(".egm-busy") && names.length === number && !names.some((text) => /waiting|writing/.test(text));
  }, count);
  const cards = () => page.evaluate(() => [...document.querySelectorAll(".egm-card")].map((node) => ({
    name: node.querySelector(".egm-name").innerText.trim(), verdict: node.querySelector(".egm-verdict").innerText,
    reasoning: node.querySelector(".egm-reasoning")?.innerText ?? "", facts: node.querySelector(".egm-facts")?.innerText ?? "" })));
  const look = async () => ({ boxes: await boxes(), marks: await marks(), cards: await cards(), things: await page.locator(".egm-thing").count() });
  await shot("opened");
  await page.fill("input[aria-label=expression]", job.expression);
  await page.click('.egm-playground button >> text="ask"');
  await done(1);
  seen.asked = await look();
  seen.written = await page.evaluate(() => window.cards);
  await shot("asked");
  await page.click('.egm-playground button >> text="ask without reasoning"');
  await done(2);
  seen.without = await look();
  await page.click('.egm-card >> nth=0 >> text="edit the reasoning"');
  await page.fill(".egm-edit textarea", job.edited);
  await shot("editing");
  await page.click('text="go on from here"');
  await done(3);
  seen.edited = await look();
  await shot("edited");

  const drag = async (number, dx, dy) => { // in pixels of the image
    const at = await page.locator(`.egm-thing[data-number="${number}"]`).boundingBox();
    const scale = await page.evaluate(() => { const d = document.querySelector(".egm-stage .egm-image"); return d.querySelector("image").getBoundingClientRect().width / d.dataset.width; });
    const [x, y] = [at.x + at.width / 2, at.y + at.height / 2];
    await page.mouse.move(x, y);
    await page.mouse.down();
    await page.mouse.move(x + dx * scale / 2, y + dy * scale / 2);
    await page.mouse.move(x + dx * scale, y + dy * scale);
    await page.mouse.up();
    await page.waitForFunction(() => !document.querySelector(".egm-card"));
  };
  await drag(job.drag, job.by_px[0], job.by_px[1]);
  await page.click('.egm-playground button >> text="ask"');
  await done(1);
  seen.dragged = await look();
  await shot("dragged");
  await page.locator(`.egm-thing[data-number="${job.drag}"]`).focus();
  await page.keyboard.press("ArrowLeft");
  await page.waitForFunction(() => !document.querySelector(".egm-card"));
  await page.waitForFunction(() => document.activeElement?.classList.contains("egm-thing")); // the object stays in hand
  seen.keyed = await page.evaluate((number) => Number(document.querySelector(`.egm-thing[data-number="${number}"]`).getAttribute("x")), job.drag);

  await page.setInputFiles(".egm-file", job.bad_file);
  await page.waitForFunction(() => document.querySelector(".egm-error").innerText);
  seen.bad_file = await text(".egm-playground > .egm-error");
  await page.setInputFiles(".egm-file", job.file);
  await page.waitForFunction(() => document.querySelector(".egm-legend").innerText.includes("mine.png"));
  await page.click('.egm-playground button >> text="ask"');
  await done(1);
  seen.own = await look();
  await page.evaluate(() => window.jupyterapp.commands.execute("application:toggle-left-area")); // it would take a phone's width
  await page.setViewportSize({ width: 390, height: 844 });
  await page.locator(".egm-playground").scrollIntoViewIfNeeded();
  await page.waitForFunction(() => document.querySelector(".egm-playground").clientWidth > 200);
  seen.phone_overflow_px = await page.evaluate(() => { const { scrollWidth, clientWidth } = document.querySelector(".egm-playground"); return scrollWidth - clientWidth; });
  await shot("phone");
}

// Runs the whole notebook, then looks at its viewer: walks, filters, jumps, hovers, hides, saves, searches.
async function lab() {
  await runAll();
  await page.locator(".egm-viewer").first().scrollIntoViewIfNeeded(); // a playground may follow it
  await page.waitForSelector(".egm-image, .egm-empty"); // a run of two steps may have nothing that its filter shows
  await shot("lab");

  const now = async () => ({ side: await text(".egm-side"), of: await text(".egm-of"), boxes: await boxes() });
  const counts = (count) => page.waitForFunction((start) => document.querySelector(".egm-of").innerText.startsWith(start), `of ${count}${count === job.total ? "" : " "}`);
  const changed = async (act) => {
    const before = await text(".egm-side");
    await act();
    await page.waitForFunction((old) => document.querySelector(".egm-side")?.innerText !== old, before);
    return now();
  };
  const press = async (key) => { await page.focus(".egm-viewer"); await page.keyboard.press(key); };
  const which = (show) => page.selectOption('select[aria-label="which samples"]', show);
  seen.opened = { of: await text(".egm-of") };
  await which("all");
  await counts(job.total);
  seen.last = await changed(() => press("End"));
  seen.first = await changed(() => press("Home"));
  seen.next = await changed(() => page.click(".egm-step[aria-label=next]"));
  seen.key = await changed(() => press("ArrowRight"));
  seen.focus_kept = await page.evaluate(() => document.activeElement.className === "egm-viewer");

  await which(job.show);
  await counts(job.show_count);
  await page.fill("input.egm-place", String(job.place + 1));
  await page.keyboard.press("Enter");
  await page.waitForFunction((name) => document.querySelector(".egm-side").innerText.includes(name), job.sample_id);
  seen.jumped = await now();
  await page.hover(".egm-card[data-model=small-egm]");
  await shot("lab-hover");
  seen.lit = await page.evaluate(() => [...document.querySelectorAll(".egm-box.egm-on")].map((node) => node.dataset.box));
  await press("2");
  await page.waitForFunction(() => !document.querySelector('.egm-stage [data-box="small-egm"]'));
  seen.hidden = Object.keys(await boxes());
  await press("2");
  await page.waitForFunction(() => document.querySelector('.egm-stage [data-box="small-egm"]'));
  for (const kind of ["PNG", "SVG"]) {
    const [download] = await Promise.all([page.waitForEvent("download"), page.click(`.egm-save button >> text="${kind}"`)]);
    await download.saveAs(join(job.out, `export.${kind.toLowerCase()}`));
    (seen.saved_as ??= []).push(download.suggestedFilename());
  }
  await which("all");
  await counts(job.total);
  await page.fill(".egm-search", job.search);
  await counts(job.search_count);
  seen.search_keeps_focus = await page.evaluate(() => document.activeElement.className === "egm-search");
  await page.fill(".egm-search", "");
  await counts(job.total);
  if (!job.groups) return;
  await page.locator(".egm-group").scrollIntoViewIfNeeded();
  seen.tiles = await page.locator(".egm-tile").count();
  await page.locator(".egm-tile").nth(1).hover();
  seen.tile_text = await text(".egm-grouptext");
  await shot("lab-group");
}

// Runs the whole notebook and measures every figure in it.
async function notebook() {
  await runAll();
  const cells = await page.locator(".jp-Notebook .jp-Cell").count();
  for (let number = 0; number < cells; number += 1) await page.locator(".jp-Notebook .jp-Cell").nth(number).scrollIntoViewIfNeeded().catch(() => {});
  await page.waitForFunction(() => [...document.querySelectorAll(".jp-OutputArea img")].every((image) => image.complete));
  // A figure is not empty: it has a size, and more than a few colours.
  seen.figures = await page.evaluate(() => [...document.querySelectorAll(".jp-OutputArea img")].map((image) => {
    const canvas = Object.assign(document.createElement("canvas"), { width: image.naturalWidth, height: image.naturalHeight }), pen = canvas.getContext("2d");
    pen.drawImage(image, 0, 0);
    const { data } = pen.getImageData(0, 0, canvas.width, canvas.height), colours = new Set();
    for (let at = 0; at < data.length; at += 4) colours.add((data[at] << 16) | (data[at + 1] << 8) | data[at + 2]);
    return { width: image.naturalWidth, height: image.naturalHeight, colours: colours.size, shown: image.getBoundingClientRect().width };
  }));
  seen.text = await page.locator(".jp-OutputArea-output").allInnerTexts();
  const numbers = await page.locator(".jp-OutputArea img").count();
  for (let number = 0; number < numbers; number += 1) await page.locator(".jp-OutputArea img").nth(number).screenshot({ path: join(job.out, `figure-${number}.png`) });
}

try {
  await { gallery, lab, playground, notebook }[job.what]();
} catch (error) {
  seen.failed = String(error);
  await shot("failed").catch(() => {});
}
await context.close();
console.log(JSON.stringify(seen));
