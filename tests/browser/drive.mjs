// Drives a headless Chromium for tests/test_browser.py: node drive.mjs '{"what": "gallery" | "lab", "url": ..., "out": folder}'
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

// Each box in pixels of the original picture, from where the browser has really put it on the screen.
const boxes = () => page.evaluate(() => {
  const drawing = document.querySelector(".egm-stage .egm-picture");
  const image = drawing.querySelector("image").getBoundingClientRect();
  const x = drawing.dataset.width / image.width, y = drawing.dataset.height / image.height;
  return Object.fromEntries([...drawing.querySelectorAll(".egm-box")].map((group) => {
    const at = group.querySelector("rect").getBoundingClientRect();
    return [group.dataset.box, [(at.left - image.left) * x, (at.top - image.top) * y, (at.right - image.left) * x, (at.bottom - image.top) * y]];
  }));
});

async function gallery() {
  for (const [name, width, height] of [["desktop", 1280, 900], ["phone", 390, 844]]) {
    await page.setViewportSize({ width, height });
    await page.goto(job.url);
    await page.waitForSelector(".egm-picture");
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
    await shot(name);
    await shot(`${name}-whole`, { fullPage: true });
  }
}

async function lab() {
  await page.goto(job.url);
  await page.waitForSelector(".jp-Notebook .jp-Cell");
  await page.waitForFunction(() => document.querySelector("#jp-main-statusbar")?.innerText.includes("| Idle")); // the kernel
  await page.locator(".jp-Notebook .jp-Cell .cm-content").first().click();
  await page.keyboard.press("Shift+Enter");
  await page.waitForSelector(".egm-picture");
  await page.locator(".egm-viewer").scrollIntoViewIfNeeded();
  await shot("lab");
  seen.first = { side: await text(".egm-side"), boxes: await boxes(), of: await text(".egm-of") };
  const changed = async (act) => {
    const before = await text(".egm-side");
    await act();
    await page.waitForFunction((old) => document.querySelector(".egm-side")?.innerText !== old, before);
    return { side: await text(".egm-side"), of: await text(".egm-of"), boxes: await boxes() };
  };
  seen.next = await changed(() => page.click(".egm-step[aria-label=next]"));
  await page.focus(".egm-viewer");
  seen.key = await changed(() => page.keyboard.press("ArrowRight"));
  seen.focus_kept = await page.evaluate(() => document.activeElement.className === "egm-viewer");
  await page.selectOption('select[aria-label="which samples"]', "B solves what A misses");
  await page.waitForFunction(() => document.querySelector(".egm-of").innerText.includes("all:"));
  seen.filtered = { of: await text(".egm-of"), boxes: await boxes() };
  await page.hover(".egm-card[data-model=small-egm]");
  await shot("lab-hover");
  seen.lit = await page.evaluate(() => [...document.querySelectorAll(".egm-box.egm-on")].map((node) => node.dataset.box));
  await page.focus(".egm-viewer");
  await page.keyboard.press("2");
  await page.waitForFunction(() => !document.querySelector('.egm-stage [data-box="small-egm"]'));
  seen.hidden = Object.keys(await boxes());
  await page.focus(".egm-viewer");
  await page.keyboard.press("2");
  await page.waitForFunction(() => document.querySelector('.egm-stage [data-box="small-egm"]'));
  const [download] = await Promise.all([page.waitForEvent("download"), page.click('.egm-save button >> text="PNG"')]);
  await download.saveAs(join(job.out, "export.png"));
  seen.saved_as = download.suggestedFilename();
  await page.fill(".egm-search", job.search);
  await page.waitForFunction((count) => document.querySelector(".egm-of").innerText.startsWith(`of ${count} `), job.search_count);
  seen.search_keeps_focus = await page.evaluate(() => document.activeElement.className === "egm-search");
  await page.fill(".egm-search", "");
  await page.selectOption('select[aria-label="which samples"]', "all");
  await page.waitForFunction((whole) => document.querySelector(".egm-of").innerText === whole, seen.first.of);
  await page.locator(".egm-group").scrollIntoViewIfNeeded();
  seen.tiles = await page.locator(".egm-tile").count();
  await page.locator(".egm-tile").nth(1).hover();
  seen.tile_text = await text(".egm-grouptext");
  await shot("lab-group");
}

try {
  await { gallery, lab }[job.what]();
} catch (error) {
  seen.failed = String(error);
  await shot("failed").catch(() => {});
}
await context.close();
console.log(JSON.stringify(seen));
