-- Who comes in by which route of gateway.yaml, and as which role. Runs in Envoy.

local function setting(name)
  local value = os.getenv(name)
  if value == nil or value == "" then
    error(name .. " is not set")
  end
  return value
end

-- What the services know are the roles' tokens; API keys are names for them.
local anon, service_role = setting("ANON_KEY"), setting("SERVICE_ROLE_KEY")
local tokens = {
  [setting("SUPABASE_PUBLISHABLE_KEY")] = anon,
  [setting("SUPABASE_SECRET_KEY")] = service_role,
  [anon] = anon,
  [service_role] = service_role,
}
local dashboard = setting("DASHBOARD_USERNAME") .. ":" .. setting("DASHBOARD_PASSWORD")

local function refuse(handle, status, message, headers)
  headers[":status"] = status
  headers["content-type"] = "application/json"
  handle:respond(headers, '{"message":"' .. message .. '"}')
end

-- A browser can't give a WebSocket headers: Realtime's clients put the key into the URL.
local function in_query(path)
  return (path:match("[?&]apikey=([^&]*)"))
end

local function bearer(authorization)
  return authorization and authorization:match("^[Bb]earer (.+)$")
end

local function with_key(handle, headers, required)
  local path = headers:get(":path")
  local authorization = bearer(headers:get("authorization"))
  local key = headers:get("apikey") or in_query(path) or authorization
  local token = key and tokens[key]
  if not token then
    if required then
      refuse(handle, "401", "No valid API key: send one of the project's as the header apikey", {})
    end
    return
  end
  headers:replace("apikey", token)
  headers:replace("x-api-key", token)
  if in_query(path) then
    local replaced = path:gsub("([?&]apikey=)[^&]*", function(name) return name .. token end)
    headers:replace(":path", replaced)
  end
  if authorization == nil or tokens[authorization] then
    headers:replace("authorization", "Bearer " .. (tokens[authorization] or token))
  end
end

local function with_password(handle, headers)
  -- Equal strings are one object in Lua: comparing them takes as long for any guess.
  if headers:get("authorization") ~= "Basic " .. handle:base64Escape(dashboard) then
    refuse(handle, "401", "Name and password of the dashboard, please",
      { ["www-authenticate"] = 'Basic realm="Supabase Studio", charset="UTF-8"' })
    return
  end
  -- Browsers send the password along with whatever page asks: others may not act by it.
  if headers:get("sec-fetch-site") == "cross-site" and headers:get(":method") ~= "GET" then
    refuse(handle, "403", "Not from the page of another site", {})
    return
  end
  headers:remove("authorization")
end

function envoy_on_request(handle)
  local access = handle:metadata():get("access")
  local headers = handle:headers()
  if access == "dashboard" then
    with_password(handle, headers)
  elseif access then
    with_key(handle, headers, access == "key")
  end
end
