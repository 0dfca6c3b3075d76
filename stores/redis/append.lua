-- Appends events to a thread's log and publishes them, all or nothing.
--
-- KEYS: the thread's stream, which is also the name of its channel
-- ARGV: 1 the id of this batch of events
--       2 '1' if the batch may have been appended before, else ''
--       3 the position of this writer's last entry, or ''
--       4 a random number
--       5 the id of the run that the events belong to, or ''
--       6 the number of events, then the events
--       then pairs: the number of an event, and what it is the last of: a run's id, or 'log'
-- Returns the last position, or LOST, ENDED or DELETED if nothing was appended.
-- Without events it returns the last position of the log, which is opened if it does not exist.
--
-- Fields of an entry: 'd' the event, 'w' its batch, 'n' the number of bytes ever appended, so that one key is enough,
-- and, if the event is the last one of something, 'e': a run's id, or 'log'.
local key, batch, writers_last, run = KEYS[1], ARGV[1], ARGV[3], ARGV[5]
local count = tonumber(ARGV[6])

local function position_of_batch()
  local upto = '+'
  while true do
    local rows = redis.call('XREVRANGE', key, upto, '-', 'COUNT', 100)
    for _, row in ipairs(rows) do
      if row[2][4] == batch then return row[1] end
      if row[1] == writers_last then return nil end
    end
    if #rows < 100 then return nil end
    upto = '(' .. rows[100][1]
  end
end

if ARGV[2] == '1' then
  local last = position_of_batch()
  if last then return last end
end

local top = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
if count == 0 and top then return top[1] end
if top and top[2][8] == 'log' then return 'DELETED' end
if writers_last ~= '' and (not top or top[1] ~= writers_last) then
  local since = redis.call('XRANGE', key, writers_last, '+', 'COUNT', 500)
  if #since == 0 or since[1][1] ~= writers_last then return 'LOST' end
  for i = 2, #since do
    if run ~= '' and since[i][2][8] == run then return 'ENDED' end
  end
end

local previous, written = nil, 0
if top then
  previous, written = top[1], tonumber(top[2][6])
else
  -- a random sequence number: a lost log of the same millisecond had other positions
  local now = redis.call('TIME')
  local id = string.format('%.0f-%s', now[1] * 1000 + math.floor(now[2] / 1000), ARGV[4])
  previous = redis.call('XADD', key, id, 'd', '{"type":"log.opened"}', 'w', '', 'n', '0')
end

local lasts = {}
for i = 7 + count, #ARGV, 2 do lasts[tonumber(ARGV[i])] = ARGV[i + 1] end

local before, expiry = written, $RETAINED_MS
for i = 1, count do
  local data, last = ARGV[6 + i], lasts[i]
  written = written + #data
  local id
  if last then
    id = redis.call('XADD', key, 'MAXLEN', '~', $RETAINED_EVENTS, '*', 'd', data, 'w', batch, 'n', written, 'e', last)
  else
    id = redis.call('XADD', key, 'MAXLEN', '~', $RETAINED_EVENTS, '*', 'd', data, 'w', batch, 'n', written)
  end
  redis.call('PUBLISH', key, id .. ' ' .. previous .. ' ' .. data)
  previous = id
  if last == 'log' then expiry = $DELETED_MS break end
end
redis.call('PEXPIRE', key, expiry)

-- after every half megabyte: delete the entries that are more than $RETAINED_BYTES bytes back
if math.floor(before / 524288) ~= math.floor(written / 524288) and written > $RETAINED_BYTES then
  local from = '-'
  while from do
    local rows = redis.call('XRANGE', key, from, '+', 'COUNT', 50)
    local first = nil
    for _, row in ipairs(rows) do
      if written - tonumber(row[2][6]) < $RETAINED_BYTES then first = row[1] break end
    end
    if first then redis.call('XTRIM', key, 'MINID', first) end
    from = not first and #rows == 50 and '(' .. rows[50][1]
  end
end
return previous
