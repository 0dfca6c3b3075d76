"""The one script that writes to Redis: append, publish, bound and expire a thread's log, all or nothing.

XADD and PUBLISH in separate commands were refused: two processes would publish in another order than they append,
and a crash between the two would leave an entry that nobody is told of.
"""

from __future__ import annotations

import hashlib

from agent_chat.stores.buffer import RETAINED_BYTES, RETAINED_EVENTS, RETAINED_SECONDS

_DELETED_SECONDS = 60.0

APPEND = """
-- KEYS: the thread's stream, which is its channel too
-- ARGV: batch, '1' if this is a retry, the position of this writer's last entry or '', a random number, events...
-- answers the last position, 'LOST', 'ENDED' or 'DELETED'; without events the last position of a log, opened if need be
local key, batch, mine = KEYS[1], ARGV[1], ARGV[3]

local ENDS = {['run.completed'] = true, ['run.failed'] = true, ['run.cancelled'] = true}

local function type_of(data)
  return string.match(data, '^{"type":"([^"]+)"')
end

local function message_of(data)
  return string.match(data, '^{"type":"[^"]+","message_id":"([^"]+)"')
      or string.match(data, '^{"type":"[^"]+","message":{"id":"([^"]+)"')
end

local function appended()
  local upto = '+'
  while true do
    local rows = redis.call('XREVRANGE', key, upto, '-', 'COUNT', 100)
    for _, row in ipairs(rows) do
      if row[2][4] == batch then return row[1] end
      if row[1] == mine then return nil end
    end
    if #rows < 100 then return nil end
    upto = '(' .. rows[100][1]
  end
end

if ARGV[2] == '1' then
  local last = appended()
  if last then return last end
end

local top = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
if #ARGV < 5 and top then return top[1] end
if top and string.sub(top[2][2], 1, 24) == '{"type":"thread.deleted"' then return 'DELETED' end
if mine ~= '' and (not top or top[1] ~= mine) then
  local since = redis.call('XRANGE', key, mine, '+', 'COUNT', 500)
  if #since == 0 or since[1][1] ~= mine then return 'LOST' end
  local run = message_of(ARGV[5])
  for i = 2, #since do
    local data = since[i][2][2]
    if run and ENDS[type_of(data)] and message_of(data) == run then return 'ENDED' end
  end
end

-- the bytes ever written are counted in each entry, so that one key is enough
local previous, written = nil, 0
if top then
  previous, written = top[1], tonumber(top[2][6])
else
  -- a random sequence number: an earlier log of this millisecond, lost, had other positions
  local now = redis.call('TIME')
  local id = string.format('%.0f-%s', now[1] * 1000 + math.floor(now[2] / 1000), ARGV[4])
  previous = redis.call('XADD', key, id, 'd', '{"type":"log.opened"}', 'w', '', 'n', '0')
end

local before, expiry = written, KEPT_MS
for i = 5, #ARGV do
  local data = ARGV[i]
  written = written + #data
  local id = redis.call('XADD', key, 'MAXLEN', '~', RETAINED_EVENTS, '*', 'd', data, 'w', batch, 'n', written)
  redis.call('PUBLISH', key, id .. ' ' .. previous .. ' ' .. data)
  previous = id
  if string.sub(data, 1, 24) == '{"type":"thread.deleted"' then expiry = DELETED_MS break end
end
redis.call('PEXPIRE', key, expiry)

-- every half megabyte: drop what lies more than eight megabytes back
if math.floor(before / 524288) ~= math.floor(written / 524288) and written > RETAINED_BYTES then
  local from = '-'
  while from do
    local rows = redis.call('XRANGE', key, from, '+', 'COUNT', 50)
    local first = nil
    for _, row in ipairs(rows) do
      if written - tonumber(row[2][6]) < RETAINED_BYTES then first = row[1] break end
    end
    if first then redis.call('XTRIM', key, 'MINID', first) end
    from = not first and #rows == 50 and '(' .. rows[50][1]
  end
end
return previous
"""
RESET = """
-- KEYS: the thread's stream
local top = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if not top or string.sub(top[2][2], 1, 24) == '{"type":"thread.deleted"' then return 0 end
return redis.call('UNLINK', KEYS[1])
"""

for _name, _value in {
    "RETAINED_EVENTS": RETAINED_EVENTS,
    "RETAINED_BYTES": RETAINED_BYTES,
    "KEPT_MS": int(RETAINED_SECONDS * 1000),
    "DELETED_MS": int(_DELETED_SECONDS * 1000),
}.items():
    APPEND = APPEND.replace(_name, str(_value))

APPEND_SHA = hashlib.sha1(APPEND.encode()).hexdigest()
