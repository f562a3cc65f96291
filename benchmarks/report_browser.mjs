// Opens a report in a real browser and says what a reader would notice; exit code 1 when something is wrong.
//
//     mkdir /tmp/browser && cd /tmp/browser && npm install playwright-core     (outside of the repository)
//     node REPOSITORY/benchmarks/report_browser.mjs REPORT.html [PICTURES]
//
// Needs Chromium; CHROMIUM names another than /usr/bin/chromium. playwright-core is taken from the current directory.
// Checks, light and dark, at 1280 and 390 pixels: no error on the console, no request but for the page itself, no
// horizontal scrolling, and with a real keyboard that curves, groups and tokens can be read. Prints the milliseconds
// until the page answers, and writes pictures where PICTURES names a folder. `window.pwned`, which the hostile answers of
// `tests/test_report.py` and `benchmarks/report.py` try to set, must stay undefined.
import { createRequire } from "node:module";
import { mkdirSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const { chromium } = createRequire(resolve("package.json"))("playwright-core");
const [report, pictures] = process.argv.slice(2);
if (!report) throw new Error("name the report: node report_browser.mjs REPORT.html [PICTURES]");
const address = pathToFileURL(resolve(report)).href;
if (pictures) mkdirSync(pictures, { recursive: true });

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"],
});
const problems = [];
for (const [width, height] of [[1280, 900], [390, 844]]) {
  for (const colorScheme of ["light", "dark"]) {
    const name = `${width}-${colorScheme}`;
    const context = await browser.newContext({ viewport: { width, height }, colorScheme, deviceScaleFactor: width < 500 ? 2 : 1 });
    const page = await context.newPage();
    page.on("console", (message) => { if (["error", "warning"].includes(message.type())) problems.push(`${name}: ${message.text()}`); });
    page.on("pageerror", (error) => problems.push(`${name}: ${error}`));
    page.on("dialog", (dialog) => { problems.push(`${name}: a dialog: ${dialog.message()}`); dialog.dismiss(); });
    page.on("request", (request) => { if (request.url() !== address) problems.push(`${name}: asked for ${request.url()}`); });
    const started = performance.now();
    await page.goto(address, { waitUntil: "load" });
    await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => setTimeout(done))));
    console.log(`${name}: ${Math.round(performance.now() - started)} ms until painted`);

    const check = async (what, expression) => { if (!(await page.evaluate(expression))) problems.push(`${name}: ${what}`); };
    const noScroll = "document.documentElement.scrollWidth <= document.documentElement.clientWidth";
    await check("the page scrolls sideways", noScroll);
    const chart = page.locator(".chart[data-name]").first();
    if (await chart.count()) {
      await chart.focus();
      await page.keyboard.press("ArrowLeft");
      if (!(await page.locator(".readout").first().textContent()).startsWith("iteration")) problems.push(`${name}: the arrows read no value`);
    }
    if (pictures) await page.screenshot({ path: `${pictures}/${name}-top.png` });
    if (pictures) await page.screenshot({ path: `${pictures}/${name}-full.png`, fullPage: true });
    if (await page.locator("#browser:not([hidden])").count()) {
      const tokens = page.locator("#group .tokens[tabindex]").first();
      if (await tokens.count()) {
        await tokens.focus();
        await page.keyboard.press("ArrowRight");
        if (!(await page.locator(".token-readout").first().textContent()).startsWith("token id")) problems.push(`${name}: the arrows read no token`);
      }
      const picks = page.locator(".list .pick");
      for (let i = 0; i < Math.min(await picks.count(), 12); i++) {
        await picks.nth(i).click();
        await check("a group makes the page scroll sideways", noScroll);
      }
      for (const option of await page.locator("#shade option").evaluateAll((nodes) => nodes.map((node) => node.value))) {
        await page.selectOption("#shade", option);
        if (pictures) {
          await page.locator("#browser").scrollIntoViewIfNeeded();
          await page.locator("#browser").screenshot({ path: `${pictures}/${name}-groups-${option}.png` });
        }
      }
      await page.selectOption("#shade", "logprob").catch(() => {});
      await page.locator("#values").check();
      await check("numbers make the page scroll sideways", noScroll);
      if (pictures) await page.locator("#browser").screenshot({ path: `${pictures}/${name}-groups-values.png` });
      await page.locator("#plain").check();
      const link = page.locator(".rows a").first();
      if (await link.count()) {
        await link.click();
        await check("a finding's link shows no member", "document.querySelector('.member.named') !== null || !location.hash.split('/')[3]");
      }
    }
    await check("an answer ran a script", "window.pwned === undefined");
    await check("an answer became markup", "document.querySelectorAll('img, iframe, object, embed, form, a[href^=\"javascript\"]').length === 0");
    if (pictures && name === "1280-light") await page.pdf({ path: `${pictures}/print.pdf`, format: "A4" });
    await context.close();
  }
}
await browser.close();
console.log(problems.length ? problems.join("\n") : "no console error, no request, no sideways scrolling, no script but the page's own");
process.exit(problems.length ? 1 : 0);
