// How long a job still takes, by how long it took to get where it is.

const ENOUGH = 0.03; // below that nothing can be said

/** Keeps what is known of running jobs, by the server's clock. */
export class Estimates {
  #seen = new Map();

  /** Take in a job's state as it came. */
  note(job) {
    if (job.status !== "processing" || !job.started_at || job.progress < ENOUGH) {
      this.#seen.delete(job.id);
      return;
    }
    const known = this.#seen.get(job.id);
    if (known?.progress === job.progress) return;
    const ran = (new Date(job.updated_at) - new Date(job.started_at)) / 1000;
    this.#seen.set(job.id, { progress: job.progress, left: (ran * (1 - job.progress)) / job.progress, at: performance.now() });
  }

  /** Return the seconds that are left, or null if nothing is known. */
  left(id) {
    const known = this.#seen.get(id);
    return known ? Math.max(0, known.left - (performance.now() - known.at) / 1000) : null;
  }
}

/** Say it roughly: nobody knows to the second. */
export function leftInWords(seconds) {
  if (seconds === null) return "";
  if (seconds < 8) return "a few seconds left";
  if (seconds < 55) return `about ${Math.ceil(seconds / 10) * 10} s left`;
  if (seconds < 3300) return `about ${Math.round(seconds / 60)} min left`;
  return `about ${(seconds / 3600).toFixed(1)} h left`;
}
