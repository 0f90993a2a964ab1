// The page of webhooks: where an owner is told that transcripts have ended, and what was sent there.

import { confirmed } from "./confirming.js";
import { api } from "./api.js";
import { byId } from "./dom.js";
import { once } from "./pressing.js";
import { toast } from "./toasts.js";
import { Deliveries } from "./webhook-deliveries.js";
import { Endpoints } from "./webhook-endpoints.js";

const EVERY = 5000; // milliseconds

let timer = null;

const deliveries = new Deliveries();
const endpoints = new Endpoints({ onChange: refresh, onSecret: showSecret });

async function refresh() {
  clearTimeout(timer);
  let problem = null;
  try {
    deliveries.name(await endpoints.load());
    await deliveries.refresh();
  } catch (error) {
    problem = error.message;
  }
  byId("problem").hidden = problem === null;
  byId("problem").textContent = problem ?? "";
  byId("live").classList.toggle("connected", problem === null);
  byId("live").textContent = problem === null ? "Live" : "Not up to date";
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(refresh, EVERY);
}

/** Show a secret until its owner says that it is stored. `of` says what it is for. */
function showSecret(secret, of) {
  byId("secret-of").textContent = of;
  byId("secret-value").value = secret;
  byId("secret").hidden = false;
  byId("secret-title").focus();
}

byId("copy-secret").addEventListener("click", async () => {
  byId("secret-value").select();
  try {
    await navigator.clipboard.writeText(byId("secret-value").value);
    toast("Copied");
  } catch {
    toast("Your browser did not allow it: the secret is selected, copy it with the keyboard.");
  }
});

function hideSecret() {
  byId("secret-value").value = "";
  byId("secret").hidden = true;
}

byId("hide-secret").addEventListener("click", () => {
  hideSecret();
  byId("endpoints-title").focus();
});
// Browsers keep pages, and show them again to whoever goes back.
addEventListener("pagehide", hideSecret);

async function makeOwnSecret() {
  const text = "Requests to the webhook URLs of your jobs are signed with it from now on, and for a day with the one before it, too.";
  if (!(await confirmed("Make a new secret?", text, "Make it"))) return;
  try {
    const { secret } = await api("POST", "/webhooks/secret", { body: {} });
    showSecret(secret, "It signs the requests to the webhook URLs of your jobs.");
  } catch (error) {
    toast(error.message);
  }
}

byId("own-secret").addEventListener("click", () => once("own-secret", makeOwnSecret));

document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : refresh()));
refresh();
