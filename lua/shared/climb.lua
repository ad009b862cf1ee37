local function depth_of(head)
  return count_of(redis.pcall('HGET', node_key(head), 'd'), math.huge)
end

-- The steps of `descend`: down to the next child as long as there is one, else up to the parent. Returns what the next
-- call resumes with, "" when `top` has been visited.
local function climb(head, top, visit, next_child, scans)
  repeat
    spend(1)
    local run, parent, depth = '', '', '0'
    if head ~= 'root' then
      run, parent, depth = unpack(redis.pcall('HMGET', node_key(head), 'r', 'p', 'd'))
    end
    local last = head == 'root' and '' or (run and #run >= 16 and hex(run))
    local child = next_child(head, last)
    if child == nil then
      local owner = head ~= top and (parent == '' and 'root' or redis.call('HGET', junction_key(parent or ''), 'o'))
      visit.leave(head, run)
      if head == top then
        return ''
      end
      child = owner or top
      if child ~= top and child ~= 'root' and depth_of(child) >= count_of(depth) then
        child = top -- not upwards: it may be a circle
        damaged = damaged + 1
      end
    end
    head = child or head
  until is_spent()
  local cursor = { head }
  for name, scan in pairs(scans) do
    if (scan.at ~= '0' or (scan.is_whole and scan.name and scan.size > 32)) and #cursor <= 100 then
      local child = scan.is_whole and scan.name or ''
      cursor[#cursor + 1] = ('%s:%s:%d:%s'):format(name, scan.at, scan.found and 1 or 0, child)
    end
  end
  return table.concat(cursor, ' ')
end
