-- Requests for wrk: of as many pages as the argument says, the first ones far more often than the last ones.
local pages = 1

function init(arguments)
    pages = tonumber(arguments[1])
end

function request()
    return wrk.format("GET", string.format("/%d", math.floor(pages * math.random() ^ 3)))
end
