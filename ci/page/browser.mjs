// A headless Chromium from npm, as strict about origins as others.
import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

export async function launch(...args) {
  return puppeteer.launch({
    args: [...chromium.args.filter(each => each !== "--disable-web-security"), ...args],
    executablePath: await chromium.executablePath(), headless: "shell",
    defaultViewport: { width: 900, height: 700 },
  });
}
