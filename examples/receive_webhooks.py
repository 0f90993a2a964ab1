"""Receive webhooks: check each signature, forget what was heard before, say the rest.

Run with the endpoint's secret and a port:

    WEBHOOK_SECRET=whsec_… python examples/receive_webhooks.py 9000
"""

import os
import sys

import uvicorn
from standardwebhooks.webhooks import Webhook, WebhookVerificationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

webhook = Webhook(os.environ["WEBHOOK_SECRET"])
heard: set[str] = set()  # a table with a unique column, in a service that restarts


async def receive(request: Request) -> Response:
    """Take an event. 204 says that it need not come again."""
    try:
        event = webhook.verify(await request.body(), dict(request.headers))
    except WebhookVerificationError:
        return Response(status_code=401)
    if request.headers["webhook-id"] not in heard:
        heard.add(request.headers["webhook-id"])
        print(event["type"], event["data"].get("id"), flush=True)
    return Response(status_code=204)


if __name__ == "__main__":
    app = Starlette(routes=[Route("/", receive, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
