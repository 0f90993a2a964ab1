// How long a job still takes, by how fast it came to where it is.

const ENOUGH = 0.03; // of the whole: of less nothing can be said

/** Keeps what is known of running jobs, by the server's clock. */
export class Estimates {
  #seen = new Map();

  /** Take in a job's state as it came. */
  note(job) {
    if (job.status !== "processing" || !job.started_at) {
      this.#seen.delete(job.id);
      return;
    }
    const before = this.#seen.get(job.id);
    const known = before?.attempt === job.attempt ? before : { attempt: job.attempt, from: begin(job), progress: null, left: null };
    if (known.progress === job.progress) return;
    const gained = job.progress - known.from.progress;
    const seconds = (new Date(job.updated_at) - known.from.at) / 1000;
    const left = gained >= ENOUGH && seconds > 0 ? (seconds * (1 - job.progress)) / gained : null;
    this.#seen.set(job.id, { ...known, progress: job.progress, left, at: performance.now() });
  }

  /** Return the seconds that are left, or null if nothing is known. */
  left(id) {
    const known = this.#seen.get(id);
    return known && known.left !== null ? Math.max(0, known.left - (performance.now() - known.at) / 1000) : null;
  }
}

// A later attempt begins with what the ones before have done, and how much that was only the first state tells.
function begin(job) {
  return job.attempt > 1 ? { progress: job.progress, at: new Date(job.updated_at) } : { progress: 0, at: new Date(job.started_at) };
}

/** Say it roughly: nobody knows to the second. */
export function leftInWords(seconds) {
  if (seconds === null) return "";
  if (seconds < 8) return "a few seconds left";
  if (seconds < 55) return `about ${Math.ceil(seconds / 10) * 10} s left`;
  if (seconds < 3300) return `about ${Math.round(seconds / 60)} min left`;
  return `about ${(seconds / 3600).toFixed(1)} h left`;
}
