"""The queue, its workers, and the command line. ``web`` is the web server, ``db`` the database.

Who calls whom is in ``pyproject.toml``, as layers that are checked. What is where:

What people use:
    ``cli``: the ``pgscribe`` command. ``client``: ``JobClient`` and ``AsyncJobClient``.
    ``dev``: everything on one machine. ``deploy``: the app on Modal. ``doctor``: what is wrong.
    ``self_hosting``: the secrets of a Supabase of one's own.
What may be done, on a connection that acts as the user or as an operator:
    ``service``: jobs. ``transcripts``: texts and corrections. ``webhooks``, ``webhook_admin``:
    an owner's, everybody's. ``operate``: what operators do. ``keys``: API keys.
    ``refusals``: what the database says no to.
A worker, from the process to the engine:
    ``worker``: the process. ``queue_worker``: its loop. ``queue``, ``connection``, ``wakeups``: how
    it gets jobs. ``tasks``, ``execution``: what it runs. ``transcription``, ``calls``,
    ``compute``: a job's chunks and who transcribes them. ``fetching``, ``storage``: the audio.
    ``deliveries``: webhooks. ``retention``: what is deleted when.
What workers and web servers tell of themselves:
    ``logs``, ``metrics``, ``health``, ``telemetry``, ``telemetry_sdk``, ``tracing``.
Pure functions:
    ``alignment``, ``corrections``, ``subtitles``, ``backoff``.
What all of them share:
    ``settings``, ``models``, ``webhook_models``, ``errors``, ``scopes``, ``tokens``, ``database``,
    ``outbound`` (HTTP to URLs of users), ``sql`` (all named queries).
"""

__version__ = "0.1.0"
