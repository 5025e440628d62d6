// What Generate does: it always adds to the queue, and never takes away.

import { Away, call, Refusal } from "./api.js";
import { endToast, toast } from "./dialogs.js";
import { byId, say } from "./dom.js";

/**
 * @param page {form, poll}.
 * @param upload see `makeUpload`.
 * @param onJobs called with the jobs that the server has accepted, when they are in `poll.jobs`.
 */
export function makeSubmit(page, upload, onJobs) {
  let sending = false;

  async function submit() {
    if (sending) return;
    endToast(); // it may say to press Generate
    if (!page.form.element.elements.prompt.value.trim()) {
      return mark("prompt", "Enter a prompt first: what the image should show.");
    }
    sending = true;
    byId("generate").setAttribute("aria-busy", "true");
    const { form, poll } = page;
    try {
      const asked = { entry: form.entry(), images: form.images, image_name: upload.value?.title };
      const { jobs } = await call("POST", "api/jobs", asked);
      poll.add(jobs);
      onJobs(jobs);
      form.newSeed(); // for the next one: the seed that is shown is the one that will be used
    } catch (error) {
      tell(error);
    } finally {
      sending = false;
      byId("generate").removeAttribute("aria-busy");
    }
  }

  function tell(error) {
    if (error instanceof Away) {
      toast("Not sent: the server does not answer. What you have entered is kept.", { problem: true });
      return;
    }
    if (!(error instanceof Refusal)) throw error;
    if (!error.field || !mark(error.field, error.message)) toast(error.message, { problem: true });
  }

  /** Says what is wrong beside a field; false where the form has no such field. */
  function mark(field, reason) {
    const { marks } = page.form;
    if (!marks.set(field, reason)) return false;
    marks.focus();
    say(reason);
    return true;
  }

  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
}
