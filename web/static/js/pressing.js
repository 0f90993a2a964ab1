// Buttons that stay as they are while they work: one that is disabled loses the focus, and a row that is shown anew
// would have another.

const busy = new Set();

/** Do what a press of a button asks for, unless it is being done. `key` is the button's name among all. */
export async function once(key, act) {
  if (busy.has(key)) return;
  busy.add(key);
  try {
    await act();
  } finally {
    busy.delete(key);
  }
}
