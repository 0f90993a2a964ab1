"""All checks, in the order in which they are shown: what others need comes first."""

from jobs.doctor import database, environment, machine, queue, services, structure
from jobs.doctor.checks import Check

_DATABASE = ("settings", "database")
_MIGRATED = (*_DATABASE, "migrations")

CHECKS = (
    Check("settings", "Settings", environment.check_settings),
    Check("database", "Database", database.check_database, ("settings",), 25.0),
    Check("role", "Database role", database.check_role, _DATABASE),
    Check("encryption", "Encryption", database.check_encryption, _DATABASE),
    Check("capacity", "Connections", database.check_capacity, _DATABASE),
    Check("transactions", "Transactions", database.check_transactions, _DATABASE),
    Check("pooler", "Notifications", database.check_pooler, _DATABASE),
    Check("clock", "Clock", database.check_clock, _DATABASE, 20.0),
    Check("migrations", "Migrations", structure.check_migrations, _DATABASE),
    Check("schema", "Schema", structure.check_schema, _MIGRATED),
    Check("tokens", "Tokens", services.check_tokens, ("settings",), 20.0),
    Check("storage", "Storage", services.check_storage, ("settings",), 60.0),
    Check("modal", "Modal", services.check_modal, ("settings",), 120.0),
    Check("ffmpeg", "ffmpeg", machine.check_ffmpeg, ("settings",), 30.0),
    Check("engine", "Engine", machine.check_engine, ("settings",), machine.IMPORT_LIMIT),
    Check("weights", "Weights", machine.check_weights, ("settings",)),
    Check("scratch", "Scratch space", machine.check_scratch, ("settings",)),
    Check("memory", "Memory", machine.check_memory, ("settings",)),
    Check("workers", "Workers", queue.check_workers, _MIGRATED),
    Check("queue", "Queue", queue.check_queue, _MIGRATED),
    Check("webhooks", "Webhooks", queue.check_webhooks, _MIGRATED),
    Check("web", "Web server", queue.check_web, ("settings",)),
)
